"""Checkpoints in a bucket: half-written and damaged ones are not used, and they can be copied to a disk and back.

Oracle: the run in a folder of this machine.
"""
import base64
import hashlib
import json
import os
import signal

import pytest
from bucket_runs import damage, data_file, names
from tiny_runs import assert_same_run
from training_fakes import StopsAt

from moejax import buckets
from moejax.training import metrics
from moejax.training.durability import checkpoint, checksums, restore, retention, stop_reasons

pytestmark = [pytest.mark.gcs, pytest.mark.usefixtures('emulated_bucket')]


def test_what_a_kill_between_rows_and_the_commit_of_a_checkpoint_leaves_is_not_used_and_removed(run, folder, on_disk):
  with pytest.raises(stop_reasons.Interrupted):
    run(folder, StopsAt(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
  half = folder / 'checkpoints' / '6'
  (half / retention.COMMITTED).unlink()  # the last object of a checkpoint to be written
  buckets.write(half / 'params' / 'd' / 'of no whole checkpoint', b'', 0)
  assert [row['step'] for row in metrics.read(folder)][-1] == 6
  assert retention.complete(folder) == [4]
  assert restore.restore_for_evaluation(folder)[1] == 4
  assert run(folder)[0] == 'Resuming after step 4 of 8.'
  assert not names(half)
  assert_same_run(folder, on_disk)


def test_a_damaged_checkpoint_is_named_set_aside_and_its_step_saved_again(run, folder, on_disk):
  run(folder)
  damage(data_file(folder, 8, 'params'))
  whole = names(folder / 'checkpoints' / '8')
  with pytest.raises(checksums.Damaged, match='params/.* differs from what was written'):
    checksums.check(folder / 'checkpoints' / '8')
  said = run(folder)
  assert f'The checkpoint {folder}/checkpoints/8 is damaged' in said[0] and 'using the one of step 4 instead' in said[0]
  assert names(folder / 'checkpoints' / 'damaged-8') == whole
  assert retention.complete(folder) == [8, 4]
  checksums.check(folder / 'checkpoints' / '8')
  assert_same_run(folder, on_disk)


def test_a_bucket_that_cannot_be_read_for_a_moment_is_no_damage(run, folder, monkeypatch):
  run(folder)
  whole = names(folder / 'checkpoints')
  def failing(*_, **__):
    raise OSError('503 try again later')
  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'restore', failing)
  with pytest.raises(stop_reasons.NoCheckpoint, match=r'checkpoints/8 cannot be read, and is not damaged \(OSError: 503'):
    run(folder)
  assert names(folder / 'checkpoints') == whole


@pytest.mark.parametrize('calls', [1, 3, 5, 7])
def test_a_move_that_is_cut_off_loses_nothing_and_can_be_tried_again(folder, calls, monkeypatch):
  contents = {name: name.encode() for name in ('about/metadata', retention.COMMITTED, 'params/a', 'params/b')}
  for name, content in contents.items():
    buckets.write(folder / '6' / name, content, 0)
  from google.cloud import storage
  with monkeypatch.context() as patch:
    done = []
    def limited(original):
      def call(*args):
        if len(done) == calls:
          raise OSError('the machine is gone')
        done.append(original)
        return original(*args)
      return call
    patch.setattr(storage.Bucket, 'copy_blob', limited(storage.Bucket.copy_blob))
    patch.setattr(storage.Blob, 'delete', limited(storage.Blob.delete))
    with pytest.raises(OSError, match='the machine is gone'):
      buckets.move(folder / '6', folder / 'damaged-6', retention.COMMITTED)
  # orbax takes what lacks this file for half-written, and removes it.
  assert (folder / '6' / retention.COMMITTED).exists() and (folder / 'damaged-6' / retention.COMMITTED).exists()
  buckets.move(folder / '6', folder / 'damaged-6', retention.COMMITTED)
  assert not names(folder / '6')
  assert {name: (folder / 'damaged-6' / name).read_bytes() for name in names(folder / 'damaged-6')} == contents


def test_the_checksum_of_a_bucket_is_the_md5_of_the_content(folder):
  buckets.write(folder / 'a', b'content', 0)
  checksums.write(folder)
  expected = base64.b64encode(hashlib.md5(b'content').digest()).decode()
  assert json.loads((folder / 'checksums.json').read_text())['files'] == {'a': [7, expected]}


# ---- between a disk and a bucket ------------------------------------------------------------------------------------


def copy_down(folder, target):
  for name, blob in buckets.objects(folder).items():
    buckets.download(blob, target / name)


def test_a_run_copied_to_a_disk_is_verified_there_and_resumes(run, folder, on_disk, tmp_path):
  with pytest.raises(stop_reasons.Interrupted):
    run(folder, StopsAt(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
  copy_down(folder, tmp_path)
  about = tmp_path / 'checkpoints' / '5' / 'about' / 'metadata'
  content = about.read_bytes()
  about.write_bytes(content.replace(b'1', b'2'))
  assert checksums.damaged(tmp_path / 'checkpoints' / '5') == ['about/metadata differs from what was written']
  about.write_bytes(content)
  assert run(tmp_path)[0] == 'Resuming after step 5 of 8.'
  assert_same_run(tmp_path, on_disk)


def test_a_run_copied_to_a_bucket_is_verified_there(folder, on_disk):
  for path in on_disk.rglob('*'):
    if path.is_file():
      buckets.upload(path, folder / path.relative_to(on_disk).as_posix())
  assert_same_run(folder, on_disk)
  damage(data_file(folder, 8, 'average'))
  assert len(checksums.damaged(folder / 'checkpoints' / '8')) == 1
  assert restore.restore_for_evaluation(folder)[1] == 4
