"""Sources of files against hand-written bytes, and against the packages that hold them."""
import gzip
import json
import struct

import numpy as np
import pytest
from sklearn.datasets import load_digits

from moejax.config import ConfigError
from moejax.data import SOURCES, DataError
from moejax.data.image_files import read_idx
from moejax.data.text_files import dialogue_text

# IDX as LeCun describes it: 0 0, type 8 (unsigned byte), 3 dimensions, big-endian sizes 2 1 3, six pixels.
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 250, 251, 252])
LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 4])


def source(**config):
  return SOURCES.build(config, 'config.data.source')


def everything(examples):
  return [examples[index] for index in range(len(examples))]


def test_constructing_a_source_touches_no_file():
  for config in (dict(name='idx', path='/none', num_classes=3), dict(name='text', files='/none/*'),
                 dict(name='jsonl', files=dict(train='/none')), dict(name='array_record', path='/none'),
                 dict(name='fashion_mnist', path='/none')):
    built = source(**config)
    assert 'train' in built.splits
    with pytest.raises(DataError, match='/none'):
      built.open('train')


def test_an_unknown_split_is_refused_with_the_known_ones():
  with pytest.raises(ConfigError, match="no split 'validation'. Allowed: train, test"):
    source(name='digits').open('validation')


# digits

def test_the_digits_of_scikit_learn_are_in_two_disjoint_splits():
  built = source(name='digits')
  train, test = everything(built.open('train')), everything(built.open('test'))
  assert (len(train), len(test)) == (1437, 360)
  found = sorted((tuple((example['image'] * 16).ravel()), int(example['label'])) for example in train + test)
  digits = load_digits()
  assert found == sorted((tuple(image.ravel()), label) for image, label in zip(digits.images, digits.target))


def test_the_split_depends_on_its_seed_alone():
  labels = lambda **config: [int(e['label']) for e in everything(source(name='digits', **config).open('test'))]
  assert labels() == labels() != labels(split_seed=1)


# IDX

def test_idx_bytes_are_read_in_row_major_order(tmp_path):
  (tmp_path / 'x').write_bytes(IMAGES)
  np.testing.assert_array_equal(read_idx(str(tmp_path / 'x')), [[[1, 2, 3]], [[250, 251, 252]]])


@pytest.mark.parametrize('zipped', [False, True])
def test_a_folder_of_idx_files_is_a_source(tmp_path, zipped):
  for name, raw in (('train-images-idx3-ubyte', IMAGES), ('train-labels-idx1-ubyte', LABELS)):
    if zipped:
      (tmp_path / f'{name}.gz').write_bytes(gzip.compress(raw))
    else:
      (tmp_path / name).write_bytes(raw)
  examples = source(name='idx', path=str(tmp_path), num_classes=10).open('train')
  assert [int(example['label']) for example in everything(examples)] == [7, 4]
  assert examples[1]['image'].tolist() == [[250, 251, 252]]


@pytest.mark.parametrize('raw, message', [
    (IMAGES[:-1], r'declares \(2, 1, 3\), 6 bytes, but 5 follow'),
    (IMAGES + b'x', '6 bytes, but 7 follow'),
    (b'\0\0\x0d\x01' + struct.pack('>I', 1) + b'1234', 'not an IDX file of bytes'),
    (b'', 'not an IDX file of bytes'),
])
def test_an_idx_file_that_contradicts_its_header_is_refused(tmp_path, raw, message):
  (tmp_path / 'x').write_bytes(raw)
  with pytest.raises(DataError, match=message):
    read_idx(str(tmp_path / 'x'))


ZIPPED = gzip.compress(IMAGES, mtime=0)


@pytest.mark.parametrize('broken', [ZIPPED[:-9], b'not gzip', ZIPPED[:12] + b'\xff' * 20],
                         ids=['cut short', 'not gzip', 'damaged'])
def test_a_corrupt_gzip_file_is_refused(tmp_path, broken):
  (tmp_path / 'x.gz').write_bytes(broken)
  with pytest.raises(DataError, match='x.gz: corrupt gzip file'):
    read_idx(str(tmp_path / 'x.gz'))


def test_different_numbers_of_images_and_labels_are_refused(tmp_path):
  (tmp_path / 't10k-images-idx3-ubyte').write_bytes(IMAGES)
  (tmp_path / 't10k-labels-idx1-ubyte').write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]))
  with pytest.raises(DataError, match="2 images but 1 labels in split 'test'"):
    source(name='idx', path=str(tmp_path), num_classes=10).open('test')


@pytest.mark.slow
def test_fashion_mnist_as_debian_installs_it():
  # apt-get install dataset-fashion-mnist; 6,000 and 1,000 examples per class (Xiao et al. 2017, section 2).
  for split, size in (('train', 6000), ('test', 1000)):
    examples = source(name='fashion_mnist').open(split)
    assert examples[0]['image'].shape == (28, 28)
    assert np.bincount([int(example['label']) for example in everything(examples)]).tolist() == [size] * 10


# text

def test_a_dialogue_is_one_line_per_turn():
  turns = [[{'text': 'Hello'}, {'text': 'how are\nyou?'}], [{'text': ' '}], [{'text': 'fine'}]]
  assert dialogue_text(turns) == 'Hello how are you?\nfine'


def test_each_chitchat_dialogue_is_in_one_split():
  built = source(name='chitchat')
  train, test = ([example['text'] for example in everything(built.open(split))] for split in ('train', 'test'))
  # 7,168 conversations are in the package; one in ten is for testing.
  assert len(train) + len(test) == 7168 and len(test) == 717
  assert all(train) and all(test) and train[0].count('\n') > 3


def test_a_text_document_is_a_file_or_a_line_that_is_not_blank(tmp_path):
  (tmp_path / 'a.txt').write_bytes('één\r\n\n  \ntwee'.encode())
  (tmp_path / 'b.txt').write_text('drie\n')
  read = lambda **config: [e['text'] for e in everything(source(name='text', **config).open('train'))]
  files = dict(train=str(tmp_path / '*.txt'))
  assert read(files=files) == ['één\r\n\n  \ntwee', 'drie\n']
  assert read(files=files, document='line') == ['één', 'twee', 'drie']


def test_one_pattern_is_split_into_train_and_test(tmp_path):
  (tmp_path / 'a.txt').write_text('\n'.join(map(str, range(20))))
  built = source(name='text', files=str(tmp_path), document='line', test_fraction=0.25)
  train, test = ([int(example['text']) for example in everything(built.open(split))] for split in ('train', 'test'))
  assert len(test) == 5 and sorted(train + test) == list(range(20))
  with pytest.raises(DataError, match='one split would be empty'):
    source(name='text', files=str(tmp_path), test_fraction=0.25).open('train')


def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'fine\nba\xffd')
  for document, count in (('file', 1), ('line', 2)):
    examples = source(name='text', files=dict(train=str(tmp_path / 'a.txt')), document=document).open('train')
    with pytest.raises(DataError, match='a.txt: byte 7 is not UTF-8'):
      examples[count - 1]


@pytest.mark.parametrize('zipped', [False, True])
def test_json_lines_are_read_by_index(tmp_path, zipped):
  texts = ['one', 'twö\n', 'three']
  raw = '\n\n'.join(json.dumps({'body': text, 'id': index}) for index, text in enumerate(texts)).encode()
  path = tmp_path / ('a.jsonl.gz' if zipped else 'a.jsonl')
  path.write_bytes(gzip.compress(raw) if zipped else raw)
  examples = source(name='jsonl', files=dict(train=str(path)), field='body').open('train')
  assert [examples[index]['text'] for index in (2, 0, 1)] == ['three', 'one', 'twö\n']


@pytest.mark.parametrize('line, message', [
    ('{"text": "cut', r'a.jsonl, line 3: not valid JSON'),
    ('{"body": "x"}', r"a.jsonl, line 3: no string 'text'; it has body"),
    ('[1]', r"line 3: no string 'text'; it has list"),
    ('{"text": 1}', r"line 3: no string 'text'"),
])
def test_a_broken_json_line_is_refused_with_its_number(tmp_path, line, message):
  (tmp_path / 'a.jsonl').write_text('{"text": "fine"}\n\n' + line + '\n')
  examples = source(name='jsonl', files=dict(train=str(tmp_path / 'a.jsonl'))).open('train')
  assert examples[0] == {'text': 'fine'}
  with pytest.raises(DataError, match=message):
    examples[1]


def test_a_truncated_gzip_of_json_lines_is_refused(tmp_path):
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-10])
  with pytest.raises(DataError, match='a.jsonl.gz: corrupt gzip'):
    source(name='jsonl', files=dict(train=str(tmp_path / 'a.jsonl.gz'))).open('train')


def test_a_missing_package_is_named_with_the_extra_to_install(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'sklearn.datasets', None)
  with pytest.raises(ImportError, match=r"source digits needs the package scikit-learn.*pip install 'moejax\[data\]'"):
    source(name='digits').open('train')
