"""Checkpoints restore the saved bits, on any mesh; what cannot be written or has vanished costs the run nothing else.

Oracle: the state that was saved, and the batches that follow in an iterator that was never interrupted.
"""
import errno
import os
import re
import shutil

import orbax.checkpoint as ocp
import pytest
from saved_checkpoints import DATA, after, assert_equal, batches, opened, restore, save, setup_of, state_at

from moejax.training import step


def test_a_checkpoint_restores_every_bit_and_the_next_batch(tmp_path):
  save(tmp_path, 3)
  state, iterator, said = restore(tmp_path)
  assert_equal(state, state_at(3))
  assert_equal(next(iterator), next(after(3)))
  assert said == []


def test_a_new_run_has_no_checkpoint(tmp_path):
  assert restore(tmp_path)[0] is None


def test_a_checkpoint_of_one_device_is_restored_onto_eight_and_back(tmp_path):
  save(tmp_path / 'one', 3)
  on_eight, iterator, _ = restore(tmp_path / 'one', devices=8)
  assert_equal(on_eight, state_at(3))
  assert len(on_eight.params['wi'].sharding.device_set) == 8
  with opened(tmp_path / 'eight') as checkpoints:
    checkpoints.save(on_eight, iterator, {})
  assert_equal(restore(tmp_path / 'eight')[0], state_at(3))


def test_the_latest_and_the_best_are_kept(tmp_path):
  rows = {number: {'eval/test/accuracy': score} for number, score in ((1, .3), (2, .9), (3, .5), (4, .1), (5, .2))}
  save(tmp_path, 1, 2, 3, 4, 5, rows=rows, keep=2, metric='eval/test/accuracy')
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4', '5']
  # and a new process knows which was the best
  save(tmp_path, 6, 7, rows={6: {'eval/test/accuracy': .4}}, keep=2, metric='eval/test/accuracy')
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '6', '7']


def test_the_best_may_be_the_smallest(tmp_path):
  rows = {number: {'eval/test/loss': score} for number, score in ((1, .3), (2, .1), (3, .5), (4, .4))}
  save(tmp_path, 1, 2, 3, 4, rows=rows, keep=1, metric='eval/test/loss', mode='min')
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4']


@pytest.mark.parametrize('data, change', [
    ({**DATA, 'examples': '63'}, 'examples was 64, now 63'),
    ({**DATA, 'a.txt': '10 bytes of checksum 76543210'}, 'a.txt was 10 bytes of checksum 01234567, now 10 bytes of'),
    ({**DATA, 'b.txt': 'new'}, 'b.txt was absent, now new'), ({'examples': '64'}, 'a.txt was .*, now absent')])
def test_data_that_changed_while_the_run_was_stopped_are_named_when_it_resumes(tmp_path, data, change):
  save(tmp_path, 2)
  said = []
  with opened(tmp_path, said, data) as checkpoints:
    assert_equal(checkpoints.restore(step.abstract_state(setup_of()), batches()), state_at(2))
  assert len(said) == 1 and re.match(f'The training data have changed since step 2: {change}', said[0])


# ---- full disk ------------------------------------------------------------------------------------------------------


class NoSpaceLater:
  """The result of a write in the background, with the error of the library that writes arrays."""

  def result(self, timeout=None):
    raise ValueError('RESOURCE_EXHAUSTED: Error writing local file: Failed to write 83 bytes: No space left on device')


@pytest.mark.parametrize('when', ['while writing in the background', 'at once'])
def test_a_full_disk_keeps_the_last_good_checkpoint_and_leaves_nothing_half_written(tmp_path, monkeypatch, when):
  save(tmp_path, 2)
  said = []

  async def no_space_later(*args, **kwargs):
    return [NoSpaceLater()]

  def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with opened(tmp_path, said) as checkpoints:
    with monkeypatch.context() as broken:
      if when == 'at once':
        broken.setattr(ocp.CheckpointManager, 'save', no_space)
      else:
        broken.setattr(ocp.type_handlers.ArrayHandler, 'serialize', no_space_later)
      checkpoints.save(state_at(4), after(4), {})
      checkpoints.wait()
    assert len(said) == 1 and 'step 4 could not be written: the disk is full' in said[0]
    assert f'The last good checkpoint is {tmp_path / "checkpoints" / "2"}' in said[0]
    assert os.listdir(tmp_path / 'checkpoints') == ['2']
    # There is room again: the run continues.
    checkpoints.save(state_at(6), after(6), {})
  assert_equal(restore(tmp_path)[0], state_at(6))


def test_files_half_written_by_a_killed_process_are_removed(tmp_path):
  save(tmp_path, 2)
  shutil.copytree(tmp_path / 'checkpoints' / '2', tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp')
  assert_equal(restore(tmp_path)[0], state_at(2))
  save(tmp_path, 4)  # orbax removes them in the background, and before it saves
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4']


def test_vanished_checkpoints_are_reported_and_the_next_is_written(tmp_path):
  said = []
  with opened(tmp_path, said) as checkpoints:
    checkpoints.save(state_at(2), after(2), {})
    checkpoints.wait()
    shutil.rmtree(tmp_path / 'checkpoints')
    checkpoints.save(state_at(4), after(4), {})
  assert said == [f'Checkpoints 2 have vanished from {tmp_path}/checkpoints. Training continues, and writes the next '
                  'one now.']
  assert_equal(restore(tmp_path)[0], state_at(4))


def test_regular_checkpoints_outlast_those_of_interruptions_and_serve_rollbacks(tmp_path):
  save(tmp_path, 2, 4, 5, 7, 9, every=2, keep=2)
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4', '7', '9']
  with opened(tmp_path, every=2, keep=2) as checkpoints:
    found = {limit: checkpoints.before(limit, step.abstract_state(setup_of())) for limit in (10, 5, 4, 2)}
  assert {limit: at and at[0] for limit, at in found.items()} == {10: 4, 5: 4, 4: 2, 2: None}
  assert_equal(found[10][1], state_at(4))
