"""Packed records: examples survive the round trip, and incomplete files are refused."""
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from moejax import data
from moejax.config import ConfigError, Explained
from moejax.data import SOURCES, DataError, pack, records, source


@given(st.dictionaries(st.text(max_size=5), st.one_of(
    st.text(), st.binary(), st.integers(-2**63, 2**63 - 1), st.floats(allow_nan=False), st.lists(st.integers(0, 9)),
    numpy_strategies.arrays(st.sampled_from(['uint8', '<i4', '>f4', 'bool']),
                            numpy_strategies.array_shapes(min_dims=0, max_dims=3),
                            elements=st.integers(0, 1))), max_size=4))
def test_an_example_comes_out_of_a_record_as_it_went_in(example):
  decoded = records.decode(records.encode(example))
  assert decoded.keys() == example.keys()
  for name, value in example.items():
    np.testing.assert_array_equal(decoded[name], value)
    if isinstance(value, np.ndarray):
      assert decoded[name].dtype == value.dtype and decoded[name].shape == value.shape
    else:
      assert type(decoded[name]) is type(value)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  folder = tmp_path_factory.mktemp('packed') / 'digits'
  command = [sys.executable, '-m', 'moejax.data.pack', f'--to={folder}', '--shards=3', '--source.name=digits',
             '--source.test_examples=100']
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return folder, done


def test_the_command_says_what_it_wrote_and_what_to_do_next(digits):
  folder, done = digits
  assert '1697 examples in train, 100 examples in test' in done.stdout
  assert f"dict(name='array_record', path='{folder}', splits=('train', 'test'), num_classes=10)" in done.stdout
  assert 'train: 100%' in done.stderr
  assert len(list(folder.glob('train-*-of-00003.array_record'))) == 3


def test_packed_digits_are_the_digits(digits):
  packed = SOURCES.build(dict(name='array_record', path=str(digits[0]), num_classes=10), 'source').open('test')
  source = SOURCES.build(dict(name='digits', test_examples=100), 'source').open('test')
  key = lambda example: (tuple(example['image'].ravel()), int(example['label']))
  assert sorted(key(packed[i]) for i in range(100)) == sorted(key(source[i]) for i in range(100))


def test_packed_digits_feed_a_pipeline(digits):
  pipeline = data.build(dict(name='images', image_size=8, channels=1, batch_size=32,
                             source=dict(name='array_record', path=str(digits[0]), num_classes=10)))
  assert next(pipeline.train(0))['image'].shape == (32, 8, 8, 1)


def test_packed_text_and_ids_are_read_back(tmp_path):
  (tmp_path / 'a.txt').write_text('één\ntwee\n')
  source = SOURCES.build(dict(name='text', files=dict(train=str(tmp_path / 'a.txt')), document='line'), 'source')
  assert pack.pack(source, str(tmp_path / 'packed')) == {'train': 2}
  read = SOURCES.build(dict(name='array_record', path=str(tmp_path / 'packed'), splits=('train',)), 'source')
  assert [read.open('train')[i] for i in range(2)] == [{'text': 'één'}, {'text': 'twee'}]


def packed(tmp_path):
  (tmp_path / 'a.txt').write_text('\n'.join(map(str, range(50))))
  source = SOURCES.build(dict(name='text', files=dict(train=str(tmp_path / 'a.txt')), document='line'), 'source')
  pack.pack(source, str(tmp_path / 'packed'), shards=2)
  return SOURCES.build(dict(name='array_record', path=str(tmp_path / 'packed'), splits=('train',)), 'config.source')


@pytest.mark.parametrize('keep', [0, 100, 40_000, -10])
def test_a_truncated_shard_is_refused_by_name(tmp_path, keep):
  source = packed(tmp_path)
  path = tmp_path / 'packed' / 'train-00001-of-00002.array_record'
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(DataError, match='train-00001-of-00002.array_record: not a complete ArrayRecord file'):
    source.open('train')


def test_missing_shards_and_interrupted_or_repeated_packing_are_refused(tmp_path):
  source = packed(tmp_path)
  with pytest.raises(DataError, match='already holds packed data'):
    packed(tmp_path)
  (tmp_path / 'packed' / 'train-00001-of-00002.array_record').unlink()
  with pytest.raises(DataError, match="25 examples in split 'train', but info.json says 50"):
    source.open('train')
  (tmp_path / 'packed' / 'info.json').unlink()
  with pytest.raises(DataError, match='has no info.json: packing was interrupted'):
    source.open('train')


def test_info_names_the_source_it_was_made_from(digits):
  info = json.loads((digits[0] / 'info.json').read_text())
  assert info == {'examples': {'train': 1697, 'test': 100}, 'num_classes': 10,
                  'source': {'name': 'digits', 'test_examples': 100}}


@pytest.mark.parametrize('flags, sentence', [
    (['--source.name=digit'], "source.name: there is no source 'digit'. Did you mean 'digits'?"),
    (['--name=digits'], 'There is no flag --name.'),
    ([], 'source.name is missing: which source?')])
def test_wrong_arguments_are_refused_in_a_sentence(tmp_path, flags, sentence):
  with pytest.raises(ConfigError) as error:
    pack.main([f'--to={tmp_path}/x', *flags])
  assert sentence in str(error.value)
  assert not (tmp_path / 'x').exists()


def test_a_missing_package_is_refused_in_a_sentence():
  with pytest.raises(Explained, match="needs the package no-such-thing.*pip install 'moejax\\[hub\\]'"):
    source.require('no_such_thing', 'no-such-thing', 'The source x', 'hub')


# existing contents of the folder

def lines(tmp_path):
  (tmp_path / 'a.txt').write_text('\n'.join(map(str, range(7))))
  return SOURCES.build(dict(name='text', files=dict(train=str(tmp_path / 'a.txt')), document='line'), 'source')


def test_an_interrupted_packing_leaves_nothing_and_can_be_repeated_with_other_shards(tmp_path, monkeypatch):
  encode, written = records.encode, []

  def interrupted(example):
    if len(written) == 4:
      raise KeyboardInterrupt
    written.append(example)
    return encode(example)
  text = lines(tmp_path)
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(records, 'encode', interrupted)
    pack.pack(text, str(tmp_path / 'packed'), shards=3)
  assert [path.name for path in tmp_path.iterdir()] == ['a.txt']
  pack.pack(text, str(tmp_path / 'packed'), shards=2)
  read = SOURCES.build(dict(name='array_record', path=str(tmp_path / 'packed'), splits=('train',)), 'source')
  assert len(read.open('train')) == 7


@pytest.mark.parametrize('name', ['train-00000-of-00003.array_record', 'notes.txt', '.hidden'])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path, name):
  (tmp_path / 'packed').mkdir()
  (tmp_path / 'packed' / name).write_text('x')
  with pytest.raises(DataError, match='packed is a file, or holds files other than packed data. Choose another'):
    pack.pack(lines(tmp_path), str(tmp_path / 'packed'))
  assert [path.name for path in (tmp_path / 'packed').iterdir()] == [name]


def test_an_empty_folder_is_filled_and_folders_above_are_made(tmp_path):
  (tmp_path / 'packed').mkdir()
  for folder in (tmp_path / 'packed', tmp_path / 'new' / 'packed'):
    assert pack.pack(lines(tmp_path), str(folder)) == {'train': 7}
    assert sorted(path.name for path in folder.iterdir()) == ['info.json', 'train-00000-of-00001.array_record']


@pytest.mark.parametrize('inside', ['', '/packed'])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path, inside):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(DataError, match='file(/packed cannot be written| is a file, or)'):
    pack.pack(lines(tmp_path), f'{tmp_path}/file{inside}')


@pytest.mark.parametrize('shards', [0, -1, -2**40])
def test_less_than_one_shard_is_refused(tmp_path, shards):
  with pytest.raises(ConfigError, match=f'--shards must be 1 or more, not {shards}'):
    pack.pack(lines(tmp_path), str(tmp_path / 'packed'), shards=shards)


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, monkeypatch):
  def full(path):
    raise RuntimeError('write failed: No space left on device\nstack trace')
  monkeypatch.setattr(records, 'writer', full)
  with pytest.raises(DataError, match=r'packed cannot be written \(write failed: No space left on device\)\.$'):
    pack.pack(lines(tmp_path), str(tmp_path / 'packed'))
  assert [path.name for path in tmp_path.iterdir()] == ['a.txt']
