"""Changed data have another fingerprint; copies have the same.

The changes are those a person or a failed copy makes: a file grows, shrinks, is edited, added, lost, or swapped.
"""
import json
import os
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moejax import data
from moejax.data import fingerprint
from moejax.data.source import SOURCES

TEXTS = {f'{name}.txt': f'{name} is a letter.\n' * 50 for name in 'abc'}


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for name, text in TEXTS.items():
    (folder / name).write_text(text)
  return folder


def of(folder, document='file'):
  source = SOURCES.build(dict(name='text', files=dict(train=str(folder)), document=document), 'config.data.source')
  return source.fingerprint('train', source.open('train'))


def test_a_copy_with_other_times_has_the_same_fingerprint(folder, tmp_path):
  before = of(folder)
  copy = shutil.copytree(folder, tmp_path / 'copy')
  for number, path in enumerate(sorted(copy.iterdir())):
    os.utime(path, (number, number))
  assert of(copy) == before
  assert json.loads(json.dumps(before)) == before  # as it is stored


def grow(folder):
  with open(folder / 'b.txt', 'a') as file:
    file.write('more\n')


def edit(folder):
  text = (folder / 'b.txt').read_text()
  (folder / 'b.txt').write_text(text.replace('letter', 'numeral', 1).replace('is a', 'isa', 1))


def swap(folder):
  (folder / 'a.txt').rename(folder / 'x')
  (folder / 'b.txt').rename(folder / 'a.txt')
  (folder / 'x').rename(folder / 'b.txt')


@pytest.mark.parametrize('change, named', [
    (grow, {'b.txt', 'bytes'}), (edit, {'b.txt'}), (swap, {'a.txt', 'b.txt'}),
    (lambda folder: (folder / 'c.txt').unlink(), {'c.txt', 'bytes', 'files', 'examples'}),
    (lambda folder: (folder / 'd.txt').touch(), {'d.txt', 'files', 'examples'})])
def test_the_file_that_changed_is_named(folder, change, named):
  before = of(folder)
  change(folder)
  after = of(folder)
  assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == named


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(size=st.integers(1, 1 << 16), place=st.floats(0, 1, exclude_max=True))
def test_every_byte_of_a_small_file_counts(tmp_path, size, place):
  content = bytearray(size)
  (tmp_path / 'a').write_bytes(content)
  before = fingerprint.of_files([str(tmp_path / 'a')])
  content[int(place * size)] = 1
  (tmp_path / 'a').write_bytes(content)
  assert fingerprint.of_files([str(tmp_path / 'a')]) != before


def test_the_first_and_last_byte_of_a_large_file_count_and_little_is_read(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(bytes(10**6))
  found = [fingerprint.of_files([str(path)])]
  for place in (0, 10**6 - 1):
    with open(path, 'r+b') as file:
      file.seek(place)
      file.write(b'x')
    found.append(fingerprint.of_files([str(path)]))
  assert found[0] != found[1] != found[2]


def test_only_some_of_a_million_files_are_read(tmp_path, monkeypatch):
  paths = [str(tmp_path / f'{number:03}') for number in range(200)]
  for path in paths:
    open(path, 'w').close()
  found = fingerprint.of_files(paths)
  assert found['files'] == '200' and {'000', '199'} < found.keys() and len(found) < 70


# ---- sources without files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config', [
    dict(name='digits'), dict(name='digits_with_captions'), dict(name='clusters'), dict(name='chitchat'),
    dict(name='mixture', sources=dict(a=dict(name='chitchat'), b=dict(name='python_prose')))])
def test_a_source_keeps_its_fingerprint_and_each_split_has_its_own(config):
  def of(split):
    source = SOURCES.build(config, 'config.data.source')
    return source.fingerprint(split, source.open(split))
  assert of('train') == of('train') != of('test')


@pytest.mark.parametrize('change', [
    lambda examples: examples[:-1], lambda examples: examples[::-1], lambda examples: examples + examples[:1],
    lambda examples: [dict(examples[0], label=9), *examples[1:]],
    lambda examples: [*examples[:-1], dict(examples[-1], text='another')],
    lambda examples: [dict(one, image=one['image'].astype(np.float64)) for one in examples],
    lambda examples: [dict(one, image=one['image'].reshape(4, 1)) for one in examples]])
def test_added_lost_or_changed_examples_change_the_fingerprint(change):
  examples = [dict(image=np.full((2, 2), number, np.float32), label=number, text=f'number {number}', tags=['a', None])
              for number in range(5)]
  assert fingerprint.of_examples(examples) == fingerprint.of_examples(list(examples))
  assert fingerprint.of_examples(change(examples)) != fingerprint.of_examples(examples)


def test_objects_without_bytes_have_one_fingerprint_in_every_process():
  one, other = ([{'image': object(), 'label': 3}] for _ in range(2))
  assert fingerprint.of_examples(one) == fingerprint.of_examples(other)


def test_the_tokenizer_file_is_part_of_the_fingerprint_of_text(folder, tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  path = tmp_path / 'tokenizer.json'

  def of(words):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, words[0]))
    tokenizer.save(str(path))
    return data.build(dict(
        name='language_model', length=8, batch_size=2, source=dict(name='text', files=dict(train=str(folder))),
        tokenizer=dict(name='huggingface', path=str(path), vocab_size=3, end_token=words[0]))).fingerprint()

  before, after = of(['end', 'a', 'b']), of(['end', 'b', 'a'])
  assert {name for name in before if before[name] != after[name]} == {'tokenizer tokenizer.json'}
