"""Batches and updates that are not finite: skipped, counted, rolled back, and the same run however often it stops.

Oracle: steps computed without the loop, and the same run undisturbed.
"""
import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import PARTS, STEPS, assert_same_run, compiled_once, crash, final_params, run
from training_fakes import StopsAt, TinyPipeline, make_setup

from moejax.training import metrics, step
from moejax.training.durability import stop_reasons


@pytest.fixture(scope='module', autouse=True)
def one_step():
  with compiled_once():
    yield


def test_a_non_finite_batch_is_skipped_reported_and_counted(tmp_path):
  row, said = run(tmp_path, TinyPipeline(poison={4}))
  assert any(line.startswith("Step 5: batch skipped. Loss nan, gradient norm nan. The batch itself is not finite: "
                             "'image', examples [2].") for line in said)
  found = metrics.read(tmp_path)
  assert [row['train/skipped'] for row in found] == [number == 5 for number in range(1, STEPS + 1)]
  assert [row['recovery/skipped'] for row in found] == [0] * 4 + [1] * 4
  assert found[4]['train/loss'] is None and row['train/loss'] > 0
  assert 'Skipped batches: 1; rollbacks: 0, which lost 0 steps.' in said


@pytest.fixture
def spoil(monkeypatch):
  """Function (step): makes the update of that step, whose loss and gradient are finite, leave NaN in the parameters."""
  def spoil(number):
    train_step = step.make_train_step(None)

    def spoiled(state, batch):
      state, measured = train_step(state, batch)
      if state.step != number:
        return state, measured
      counted = dict(state.skips, in_a_row=jnp.int32(1), skipped=state.skips['skipped'] + 1)
      state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params), skips=counted)
      return state, dict(measured) | {'recovery/not_finite': jnp.int32(3), 'recovery/in_a_row': jnp.int32(1)}
    monkeypatch.setattr(step, 'make_train_step', lambda setup: spoiled)
  return spoil


def test_a_state_spoiled_by_an_update_is_not_saved_and_the_run_rolls_back(tmp_path, spoil):
  """The state of step 6 is checked after step 7; the last one known to be finite is the checkpoint of step 4."""
  spoil(6)
  _, said = run(tmp_path)
  assert any(line.startswith('Step 6: the update cannot be kept. Loss ') and '(arrays: 3; ' in line
             for line in said)
  line, = [line for line in said if 'Rolled back' in line]
  assert line.startswith('The state is not finite. Rolled back to the checkpoint of step 4; steps lost: 3.')
  assert {path.name for path in (tmp_path / 'checkpoints').glob('[0-9]*')} == {'4', '8'}
  assert all(np.isfinite(leaf).all() for leaf in final_params(tmp_path).values())


def test_a_state_spoiled_by_the_last_update_stops_the_run_with_the_previous_checkpoint(tmp_path, spoil):
  spoil(STEPS)
  with pytest.raises(stop_reasons.Diverged, match='Step 8: .* It was the last step. The last good checkpoint is .*/6'):
    run(tmp_path)
  assert all(np.isfinite(leaf).all() for leaf in final_params(tmp_path).values())


ROLLBACK = dict(recovery=dict(patience=2), checkpoint=dict(every=2, keep=3), loggers=('csv',))


def test_after_too_many_skips_in_a_row_the_run_rolls_back_and_moves_past_the_data(tmp_path):
  """Steps 5 and 6 are bad, which is seen after step 7. The state after step 4 leads to them, so back to 2."""
  _, said = run(tmp_path, TinyPipeline(poison={4, 5}), **ROLLBACK)
  line, = [line for line in said if 'Rolled back' in line]
  assert line == ('Batches skipped in a row: 2. Rolled back to the checkpoint of step 2; steps lost: 5. '
                  'Training continues with the next batch.')
  found = metrics.read(tmp_path)
  assert [row['recovery/rollbacks'] for row in found] == [0] * 6 + [1] * 2
  assert [row['recovery/lost'] for row in found] == [0] * 6 + [5] * 2
  # Step 8 used the parameters of step 2 and batch 7: its loss, computed without the loop.
  setup = make_setup(**PARTS)
  state, batches = step.init_state(setup), setup.pipeline
  train_step = step.make_train_step(setup)
  for number in (0, 1):
    state, _ = train_step(state, setup.place(batches.batch(number)))
  state = dataclasses.replace(state, step=jnp.int32(7))
  _, measured = train_step(state, setup.place(batches.batch(7)))
  assert found[-1]['train/loss'] == float(measured['train/loss'])


@pytest.mark.parametrize('number', [5, 6, 7])
def test_a_run_that_crashed_around_a_rollback_resumes_as_if_it_had_not(tmp_path, number):
  class Poisoned(StopsAt):
    def __init__(self, *arguments):
      super().__init__(*arguments)
      self.poison = {4, 5}

  run(tmp_path / 'undisturbed', TinyPipeline(poison={4, 5}), **ROLLBACK)
  with pytest.raises(Exception, match='power failure'):
    run(tmp_path / 'crashed', Poisoned(number, crash), **ROLLBACK)
  run(tmp_path / 'crashed', TinyPipeline(poison={4, 5}), **ROLLBACK)
  assert_same_run(tmp_path / 'crashed', tmp_path / 'undisturbed')
  tables = []
  for name in ('crashed', 'undisturbed'):
    with open(tmp_path / name / 'metrics.csv', newline='') as file:
      tables.append([metrics.repeatable(row) for row in csv.DictReader(file)])
  assert tables[0] == tables[1] and [row['step'] for row in tables[0]] == list('12345678')


def test_a_run_without_rollbacks_left_stops_and_names_the_bad_batch(tmp_path):
  with pytest.raises(stop_reasons.Diverged) as stop:
    run(tmp_path, TinyPipeline(poison={4}), recovery=dict(patience=1, max_rollbacks=0))
  message = str(stop.value)
  assert "Step 5: Loss nan" in message and "The batch itself is not finite: 'image', examples [2]" in message
  assert f'The last good checkpoint is {tmp_path}/checkpoints/4' in message
  assert 'The update was not applied. No rollback is left (config.recovery.max_rollbacks=0).' in message


def test_without_a_checkpoint_to_roll_back_to_the_run_stops(tmp_path):
  with pytest.raises(stop_reasons.Diverged, match='There is no earlier checkpoint to roll back to.'):
    run(tmp_path, TinyPipeline(poison={1}), recovery=dict(patience=1))
