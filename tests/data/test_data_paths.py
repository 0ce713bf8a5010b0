"""Paths of data: taken literally except for `*` and `~`; URLs are refused."""
import os
import sys

import pytest

from moejax import buckets
from moejax.data import SOURCES, TOKENIZERS, DataError, pack
from moejax.data.files import expand, local_path

NAMES = ('plain', 'a[b]', 'what?', 'star*', 'é è', '[!x]', '{a,b}')


@pytest.mark.parametrize('name', NAMES)
def test_a_folder_and_a_file_of_any_name_are_found(tmp_path, name):
  folder = tmp_path / name
  folder.mkdir()
  for file in ('1.txt', f'{name}.txt'):
    (folder / file).write_text(file)
  both = sorted(str(folder / file) for file in ('1.txt', f'{name}.txt'))
  assert expand(str(folder), 'x') == expand(str(folder / '*.txt'), 'x') == both
  assert expand(str(folder / f'{name}.txt'), 'x') == [str(folder / f'{name}.txt')]
  assert expand(str(tmp_path / '**' / '*.txt'), 'x') == both


@pytest.mark.parametrize('name', NAMES)
def test_packed_data_are_found_in_a_folder_of_any_name(tmp_path, name):
  (tmp_path / 'a.txt').write_text('one\ntwo')
  text = SOURCES.build(dict(name='text', files=dict(train=str(tmp_path / 'a.txt')), document='line'), 'source')
  pack.pack(text, str(tmp_path / name), shards=2)
  source = SOURCES.build(dict(name='array_record', path=str(tmp_path / name), splits=('train',)), 'source')
  packed = source.open('train')
  assert sorted(packed[index]['text'] for index in range(len(packed))) == ['one', 'two']


def test_splits_with_a_common_prefix_are_distinguished(tmp_path):
  for name, text in (('a', 'one\ntwo'), ('b', 'three')):
    (tmp_path / name).write_text(text)
  files = {'train': str(tmp_path / 'a'), 'train-2': str(tmp_path / 'b')}
  pack.pack(SOURCES.build(dict(name='text', files=files, document='line'), 'source'), str(tmp_path / 'packed'))
  packed = SOURCES.build(dict(name='array_record', path=str(tmp_path / 'packed'), splits=tuple(files)), 'source')
  assert [len(packed.open(split)) for split in files] == [2, 1]


def test_the_home_folder_is_found_wherever_a_path_is_read(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('one')
  for files in ('~/a.txt', '~', '~/*.txt'):
    assert expand(files, 'x') == [str(tmp_path / 'a.txt')]
  text = SOURCES.build(dict(name='text', files=dict(train='~/a.txt')), 'source')
  pack.pack(text, '~/packed')
  assert os.path.exists(tmp_path / 'packed' / 'info.json')
  assert len(SOURCES.build(dict(name='array_record', path='~/packed', splits=('train',)), 'source').open('train')) == 1


@pytest.mark.parametrize('url', ['s3://bucket/*.txt', 'https://host/a', 'file:///a'])
def test_a_url_is_refused_by_every_source_of_files_and_never_a_folder_of_that_name(url, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for config in (dict(name='text', files=url), dict(name='jsonl', files=dict(train=url)),
                 dict(name='array_record', path=url), dict(name='idx', path=url, num_classes=2),
                 dict(name='spoken_digits', path=url)):
    with pytest.raises(DataError, match=r'source\.(files|path).*: .* is a URL, but only local files and gs:// can'):
      SOURCES.build(config, 'source').open('train')
  for config in (dict(name='sentencepiece'), dict(name='huggingface', end_token='x')):
    with pytest.raises(DataError, match='tokenizer.path: .* is a URL'):
      TOKENIZERS.build(dict(path=url, vocab_size=3, **config), 'tokenizer').encode({'text': 'x'})
  with pytest.raises(DataError, match='--to: .* is a URL'):
    pack.pack(SOURCES.build(dict(name='digits'), 'source'), url)
  assert not os.listdir(tmp_path)


def test_data_in_a_bucket_say_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  monkeypatch.setattr(buckets, '_set_up', buckets._set_up.__wrapped__)
  with pytest.raises(DataError, match=r"source.files: gs://b/a cannot be copied .*: pip install 'moejax\[gcs\]'"):
    SOURCES.build(dict(name='text', files='gs://b/a'), 'source').open('train')


@pytest.mark.parametrize('path', ['a:b', 'C:/x', './gs:/x', '://x'])
def test_a_path_with_a_colon_is_a_path(path):
  assert local_path(path, 'x') == path
