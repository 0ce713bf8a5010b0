"""Data in a bucket are read from copies on this machine: verified, made once, and never of what is gone."""
import json
import os
import shutil

import pytest

from moejax import buckets
from moejax.data import SOURCES, TOKENIZERS, DataError, bucket_copies, pack
from moejax.data.files import expand, local_path

pytestmark = [pytest.mark.gcs, pytest.mark.usefixtures('emulated_bucket')]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'moejax' / 'gs' / 'bucket'


@pytest.fixture
def folder(request):
  """The address of a folder of its own in the bucket."""
  return f'gs://bucket/data/{request.node.name}'.replace('[', '-').replace(']', '')


def put(address, content):
  file = buckets.path(address)
  buckets.write(file, content.encode(), buckets.read(file)[1])


def names(paths):
  return [os.path.basename(path) for path in paths]


def test_a_file_a_folder_and_a_pattern_name_what_they_name_on_a_disk(folder, tmp_path):
  for name in ('a.txt', 'b.txt', 'a.txt.gz', 'deep/a.txt', 'deep/deeper/b.txt', '[a].txt'):
    put(f'{folder}/{name}', name)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  for pattern in ('/a.txt', '', '/*.txt', '/a*', '/**/*.txt', '/deep', '/deep/*', '/d*p/a.txt', '/[a].txt', '/**'):
    found, wanted = expand(folder + pattern, 'x'), expand(str(tmp_path) + pattern, 'x')
    wanted = [path for path in wanted if '/cache/' not in path]
    assert names(found) == names(wanted), pattern
    assert [open(path).read() for path in found] == [open(path).read() for path in wanted]
    shutil.rmtree(tmp_path / 'cache')


def test_what_has_not_changed_is_not_copied_again_and_what_is_gone_does_not_count(folder, monkeypatch, capsys):
  copied = []
  download = buckets.download
  monkeypatch.setattr(buckets, 'download', lambda blob, local: (copied.append(local.name), download(blob, local)))
  for name in ('a', 'b', 'c'):
    put(f'{folder}/{name}', name)
  assert names(expand(folder, 'x')) == ['a', 'b', 'c'] == copied
  assert f'Copying {folder} to' in capsys.readouterr().out
  expand(folder, 'x')
  assert copied == ['a', 'b', 'c'] and not capsys.readouterr().out
  put(f'{folder}/b', 'other')  # as many bytes or not
  buckets.path(f'{folder}/c').unlink()
  found = expand(folder, 'x')
  assert names(found) == ['a', 'b'] and open(found[1]).read() == 'other'
  assert copied == ['a', 'b', 'c', 'b']


def test_a_copy_that_was_cut_off_or_changed_is_made_again(folder, monkeypatch):
  put(f'{folder}/a', 'whole')
  put(f'{folder}/b', 'whole')
  path = local_path(f'{folder}/a', 'x')
  with open(path, 'w') as file:
    file.write('half')

  def cut_off(blob, partial):
    with open(partial, 'w') as file:
      file.write('ha')
    raise OSError('the connection was lost')
  from google.cloud import storage
  with monkeypatch.context() as patch:
    patch.setattr(storage.Blob, 'download_to_filename', cut_off)
    with pytest.raises(DataError, match=f'x: {folder}/b cannot be copied to this machine: the connection was lost'):
      local_path(f'{folder}/b', 'x')
  assert [open(path).read() for path in (local_path(f'{folder}/a', 'x'), local_path(f'{folder}/b', 'x'))] == ['whole'] * 2


def test_what_arrives_with_another_checksum_is_not_used(folder, cache, monkeypatch):
  put(f'{folder}/a', 'whole')
  monkeypatch.setattr('gcp_storage_emulator.storage.Storage.get_file', lambda *_, **__: b'wh0le')
  with pytest.raises(DataError, match='cannot be copied to this machine: DataCorruption: Checksum mismatch'):
    local_path(f'{folder}/a', 'x')
  monkeypatch.undo()
  assert not (cache / 'data' / folder.rpartition('/')[2] / 'a').exists()


@pytest.mark.parametrize('address, sentence', [
    ('gs://nowhere/a', 'there is no bucket nowhere'), ('gs://bucket/nothing/*', 'there is no object gs://bucket/nothing/'),
    ('gs://bucket', 'it names no folder')])
def test_an_address_without_data_is_named_with_the_key(address, sentence):
  with pytest.raises(DataError, match=f'source.files: .* cannot be copied to this machine: {sentence}'):
    expand(address, 'source.files')


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_copied(folder, cache, monkeypatch):
  put(f'{folder}/a', 'a' * 100)
  monkeypatch.setattr(bucket_copies.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 50, 50))
  with pytest.raises(DataError, match='Set XDG_CACHE_HOME to a folder on a larger disk, or mount the bucket'):
    local_path(folder, 'x')
  assert not list(cache.glob('**/a'))


# ---- every reader of files ------------------------------------------------------------------------------------------


def test_text_and_json_lines_are_read_as_from_a_disk(folder):
  put(f'{folder}/train.txt', 'one\ntwo')
  put(f'{folder}/test.txt', 'three')
  files = dict(train=f'{folder}/train.txt', test=f'{folder}/te*.txt')
  text = SOURCES.build(dict(name='text', files=files, document='line'), 'source')
  train = text.open('train')
  assert [train[index]['text'] for index in range(len(train))] == ['one', 'two'] and len(text.open('test')) == 1
  assert text.fingerprint('train', train) == text.fingerprint('train', train) and 'train.txt' in text.fingerprint('train', train)
  put(f'{folder}/a.jsonl', json.dumps({'text': 'four'}))
  lines = SOURCES.build(dict(name='jsonl', files=dict(train=f'{folder}/a.jsonl')), 'source').open('train')
  assert lines[0]['text'] == 'four'


def test_packed_records_are_read_as_from_a_disk(folder, tmp_path):
  digits = SOURCES.build(dict(name='digits'), 'source')
  counts = pack.pack(digits, str(tmp_path / 'packed'), shards=2)
  for path in (tmp_path / 'packed').iterdir():
    buckets.upload(path, buckets.path(f'{folder}/packed/{path.name}'))
  source = SOURCES.build(dict(name='array_record', path=f'{folder}/packed', num_classes=10), 'source')
  for split, count in counts.items():
    examples, wanted = source.open(split), digits.open(split)
    assert len(examples) == count
    assert sorted(examples[index]['label'] for index in range(count)) == sorted(int(wanted[index]['label']) for index in range(count))


def test_tokenizers_are_read_and_packing_into_a_bucket_is_refused(folder, tmp_path):
  put(f'{folder}/tokenizer.json', 'of no tokenizer')
  tokenizer = TOKENIZERS.build(dict(name='huggingface', path=f'{folder}/tokenizer.json', vocab_size=3, end_token='x'), 'tokenizer')
  with pytest.raises(DataError, match='/cache/moejax/gs/bucket/data/.*tokenizer.json'):
    tokenizer.encode({'text': 'x'})
  with pytest.raises(DataError, match='--to: .* is a URL. Pack into a folder'):
    pack.pack(SOURCES.build(dict(name='digits'), 'source'), folder)
