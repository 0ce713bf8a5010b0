"""The file that is damaged is named, whatever was done to it."""
import pytest

from moejax.training import checksums


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'params' / 'd').mkdir(parents=True)
  (tmp_path / 'params' / 'd' / 'shard').write_bytes(bytes(range(256)) * 40)
  (tmp_path / 'about').write_text('{}')
  (tmp_path / 'empty').touch()
  checksums.write(tmp_path)
  return tmp_path


def test_what_is_as_it_was_written_is_not_named(folder):
  assert checksums.damaged(folder) == []
  checksums.explain(folder, ValueError())


def test_a_change_of_one_bit_is_found(folder):
  path = folder / 'params' / 'd' / 'shard'
  content = bytearray(path.read_bytes())
  content[5000] ^= 1
  path.write_bytes(content)
  assert checksums.damaged(folder) == ['params/d/shard has other contents than were written']
  with pytest.raises(checksums.Damaged, match='params/d/shard'):
    checksums.explain(folder, ValueError())


def test_cut_off_and_missing_files_are_found(folder):
  path = folder / 'params' / 'd' / 'shard'
  path.write_bytes(path.read_bytes()[:100])
  (folder / 'about').unlink()
  assert checksums.damaged(folder) == ['about is missing', 'params/d/shard has 100 bytes instead of 10240']


def test_damaged_checksums_are_named_themselves(folder):
  (folder / 'checksums.json').write_text('{"about": [')
  assert checksums.damaged(folder) == ['checksums.json cannot be read']
