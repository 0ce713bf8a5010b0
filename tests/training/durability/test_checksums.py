"""A damaged file is named, whatever the damage."""
import pytest

from moejax.training.durability import checksums


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'params' / 'd').mkdir(parents=True)
  (tmp_path / 'params' / 'd' / 'shard').write_bytes(bytes(range(256)) * 40)
  (tmp_path / 'about').write_text('{}')
  (tmp_path / 'empty').touch()
  checksums.write(tmp_path)
  return tmp_path


def test_unchanged_files_are_not_named(folder):
  assert checksums.damaged(folder) == []
  checksums.check(folder)


def test_a_change_of_one_bit_is_found(folder):
  path = folder / 'params' / 'd' / 'shard'
  content = bytearray(path.read_bytes())
  content[5000] ^= 1
  path.write_bytes(content)
  assert checksums.damaged(folder) == ['params/d/shard differs from what was written']
  with pytest.raises(checksums.Damaged, match='params/d/shard'):
    checksums.check(folder)


def test_truncated_and_missing_files_are_found(folder):
  path = folder / 'params' / 'd' / 'shard'
  path.write_bytes(path.read_bytes()[:100])
  (folder / 'about').unlink()
  assert checksums.damaged(folder) == ['about is missing', 'params/d/shard has 100 bytes instead of 10240']


@pytest.mark.parametrize('content', [b'{"about": [', b'{}', b'[]', b'{"files": {}}', b'\xff'])
def test_damaged_checksums_are_named_themselves(folder, content):
  (folder / 'checksums.json').write_bytes(content)
  assert checksums.damaged(folder) == ['checksums.json cannot be read']


def test_a_change_of_one_digit_of_the_checksums_accuses_no_other_file(folder):
  text = (folder / 'checksums.json').read_text()
  (folder / 'checksums.json').write_text(text.replace('10240', '10241'))
  assert checksums.damaged(folder) == ['checksums.json differs from what was written']


def test_checking_a_part_reads_and_names_no_other_file(folder):
  (folder / 'params' / 'd' / 'shard').unlink()
  checksums.check(folder, 'about')
  with pytest.raises(checksums.Damaged, match='params/d/shard is missing'):
    checksums.check(folder, 'params/')


def test_files_that_orbax_rewrites_later_are_not_accused(folder):
  (folder / '_CHECKPOINT_METADATA').write_text('{}')
  checksums.write(folder)
  (folder / '_CHECKPOINT_METADATA').write_text('{"committed": true}')
  assert checksums.damaged(folder) == []
