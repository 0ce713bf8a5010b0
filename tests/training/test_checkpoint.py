"""Checkpoints restore the saved bits, on any mesh; damaged or half-written ones are never used.

Oracle: the state that was saved, and the batches that follow in an iterator that was never interrupted.
"""
import errno
import functools
import os
import re
import shutil

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import strategies as st
from training_fakes import make_setup

from moejax.training import checkpoint, checksums, fingerprints, step
from moejax.training.recovery import NoCheckpoint

DATA = {'examples': '64', 'a.txt': '10 bytes of checksum 01234567'}


@functools.cache
def setup_of(devices=1):
  return make_setup(devices, training=dict(average=0.5))


@functools.cache
def state_of(devices=1):
  return step.init_state(setup_of(devices))


def state_at(number, devices=1):
  """A state in which every float depends on its step."""
  return jax.tree.map(lambda x: x + x.dtype.type(number), state_of(devices))


def opened(folder, said=None, data=DATA, **options):
  return checkpoint.Checkpoints(folder, setup_of().config, checkpoint.CheckpointConfig(**options),
                                (said if said is not None else []).append, data)


def batches():
  return setup_of().pipeline.train(0)


def after(count):
  iterator = batches()
  for _ in range(count):
    next(iterator)
  return iterator


def save(folder, *numbers, rows=None, **options):
  with opened(folder, **options) as checkpoints:
    for number in numbers:
      checkpoints.save(state_at(number), after(number), (rows or {}).get(number, {}))


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def restore(folder, devices=1):
  said, iterator = [], batches()
  with opened(folder, said) as checkpoints:
    state = checkpoints.restore(step.abstract_state(setup_of(devices)), iterator)
  return state, iterator, said


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


# ---- damage ---------------------------------------------------------------------------------------------------------


def array_files(folder):
  return [path for path in folder.rglob('d/*') if path.is_file()]


def cut_off(folder):
  for path in array_files(folder / 'params'):
    path.write_bytes(path.read_bytes()[:-20])


def flip_bits(folder):
  for path in array_files(folder / 'opt_state'):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def lose_an_item(folder):
  shutil.rmtree(folder / 'average')


def lose_what_says_what_it_is(folder):
  for path in (folder / 'about').iterdir():
    path.unlink()


def say_another(old, new):
  def damage(folder):
    """Its about is valid JSON with other contents."""
    path = folder / 'about' / 'metadata'
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
  return damage


next_batch_is_another = say_another('"next_index": 4', '"next_index": 5')
step_is_another = say_another('"step": 4', '"step": 6')
config_is_another = say_another(r'\"log_every\": 1', r'\"log_every\": 3')


def lose_the_checksums(folder):
  (folder / 'checksums.json').unlink()


def change_one_number(folder):
  """Files that are complete but changed, which no library can notice."""
  params = state_at(4).params
  params['wi'] = params['wi'].at[1, 2, 3].add(1e-3)
  shutil.rmtree(folder / 'params')
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / 'params', params)


@pytest.mark.parametrize('damage', [
    cut_off, flip_bits, lose_an_item, lose_what_says_what_it_is, next_batch_is_another, step_is_another,
    config_is_another, lose_the_checksums, change_one_number])
def test_a_damaged_latest_checkpoint_is_reported_and_the_previous_one_used(tmp_path, damage):
  save(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  state, iterator, said = restore(tmp_path)
  assert_equal(state, state_at(2))
  assert_equal(next(iterator), next(after(2)))
  assert len(said) == 1 and 'checkpoints/4 is damaged' in said[0] and 'step 2 instead' in said[0]
  assert '_CHECKPOINT_METADATA' not in said[0]  # which is intact
  # The same step can be saved again, and is then used.
  save(tmp_path, 4)
  assert_equal(restore(tmp_path)[0], state_at(4))


def test_if_every_checkpoint_is_damaged_the_run_stops_and_touches_nothing(tmp_path):
  save(tmp_path, 2, 4)
  for number in ('2', '4'):
    cut_off(tmp_path / 'checkpoints' / number)
  with pytest.raises(NoCheckpoint, match='No checkpoint in .* can be read'):
    restore(tmp_path)
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '4']


def test_the_checksum_covers_every_bit_of_about(tmp_path):
  save(tmp_path, 2)
  path = tmp_path / 'checkpoints' / '2' / 'about' / 'metadata'
  sound = path.read_bytes()
  for place in range(0, len(sound), 7):
    changed = bytearray(sound)
    changed[place] ^= 1 << place % 8
    path.write_bytes(changed)
    with pytest.raises(checksums.Damaged, match='about/metadata differs from'):
      checksums.check(path.parents[1], 'about/')


@pytest.mark.parametrize('damage', [next_batch_is_another, step_is_another, config_is_another])
def test_evaluation_refuses_changed_files(tmp_path, damage, capsys):
  save(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  assert checkpoint.restore_for_evaluation(tmp_path)[1] == 2
  assert 'checkpoints/4 is damaged (Damaged: about/metadata' in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'{"score": 0.', b'\xff', b'{}', b'{"score": 9.9}'])
def test_a_damaged_score_costs_no_checkpoint(tmp_path, content):
  options = dict(keep=1, metric='eval/test/accuracy')
  save(tmp_path, 2, 4, rows={2: {'eval/test/accuracy': .3}, 4: {'eval/test/accuracy': .2}}, **options)
  (tmp_path / 'checkpoints' / '4' / 'metrics' / 'metrics').write_bytes(content)
  said = []
  with opened(tmp_path, said, **options) as checkpoints:
    assert_equal(checkpoints.restore(step.abstract_state(setup_of()), batches()), state_at(4))
    checkpoints.save(state_at(6), after(6), {'eval/test/accuracy': .1})
  assert len(said) == 1 and 'score of the checkpoint' in said[0] and 'checkpoints/4 is damaged (metrics/' in said[0]
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['2', '6']  # the best, and the last


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


FIXED = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)


@hypothesis.given(st.integers(0, 23), st.integers(1, 2**32 - 1))
def test_the_fingerprint_changes_with_any_change_of_one_element(index, bits):
  changed = np.asarray(FIXED).copy()
  changed.reshape(-1).view(np.uint32)[index] ^= np.uint32(bits)
  assert fingerprints.fingerprint({'a': changed}) != fingerprints.fingerprint({'a': FIXED})


def test_the_fingerprint_changes_when_elements_swap_places():
  assert fingerprints.fingerprint(FIXED) != fingerprints.fingerprint(FIXED[:, ::-1])


@pytest.mark.parametrize('x', [FIXED, FIXED[0, 0, 0], FIXED.astype(jnp.bfloat16), FIXED.astype(jnp.uint8), FIXED > 5])
def test_an_array_of_the_host_has_the_fingerprint_that_it_has_on_a_device(x):
  assert fingerprints.fingerprint(np.asarray(x)) == fingerprints.fingerprint(x)


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


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_restores_config_step_average_and_router_state_from_the_checkpoint_alone(tmp_path):
  save(tmp_path, 2, 4)
  (tmp_path / 'elsewhere').mkdir()
  shutil.move(tmp_path / 'checkpoints', tmp_path / 'elsewhere' / 'checkpoints')
  config, number, params, router_state = checkpoint.restore_for_evaluation(tmp_path / 'elsewhere')
  assert number == 4 and config == setup_of().config
  assert_equal(params, state_at(4).average)
  assert_equal(router_state, state_at(4).router_state)
  assert checkpoint.restore_for_evaluation(tmp_path / 'elsewhere', step=2)[1] == 2


def test_evaluation_says_where_it_looked_for_checkpoints(tmp_path):
  with pytest.raises(NoCheckpoint, match='has no checkpoints: train first'):
    checkpoint.restore_for_evaluation(tmp_path)
  save(tmp_path, 2)
  with pytest.raises(NoCheckpoint, match=r'no checkpoint of step 3; there are \[2\]'):
    checkpoint.restore_for_evaluation(tmp_path, step=3)


# ---- what is missing or damaged, and what a rollback finds ----------------------------------------------------------


@pytest.mark.parametrize('damage, file', [
    (cut_off, 'params/.*d/.* has .* bytes instead of'), (flip_bits, 'opt_state/.*d/.* differs from'),
    (lose_an_item, 'average/.* is missing')])
def test_the_damaged_file_is_named(tmp_path, damage, file):
  save(tmp_path, 2, 4)
  damage(tmp_path / 'checkpoints' / '4')
  said = restore(tmp_path)[2]
  assert re.search(f'checkpoints/4 is damaged .*{file}', said[0])


def test_an_item_that_was_damaged_before_it_was_written_is_named(tmp_path):
  """Bits that changed before they were written, which checksums cannot detect."""
  save(tmp_path, 2, 4)
  change_one_number(tmp_path / 'checkpoints' / '4')
  checksums.write(tmp_path / 'checkpoints' / '4')
  assert 'params differs from what was saved' in restore(tmp_path)[2][0]


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
