"""The loop: the files of a run, and that every way of stopping and resuming gives the same run.

Oracle: an uninterrupted run of the same set-up. Processes that are killed are in test_train_command.py.
"""
import csv
import dataclasses
import errno
import gzip
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from training_fakes import StopsAt, TinyPipeline, make_setup

from moejax import evaluate
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.training import checkpoint, loop, metrics, recovery, step
from moejax.training.setup import Report

STEPS = 8
PARTS = dict(evaluate=True, evaluation=dict(every=4), training=dict(steps=STEPS, average=0.9))


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """All set-ups here differ in their data alone, so they can share the compiled step."""
  setup = make_setup(**PARTS)
  train_step, first = step.make_train_step(setup), step.init_state(setup)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, 'make_train_step', lambda setup: train_step)
    patch.setattr(step, 'init_state', lambda setup: jax.tree.map(jnp.copy, first))
    yield


def run(folder, pipeline=None, **sections):
  said = []
  row = loop.train(make_setup(pipeline=pipeline, **{**PARTS, **sections}), folder, said.append)
  return row, said


def rows(folder):
  return [metrics.repeatable(row) for row in metrics.read(folder)]


def final_params(folder):
  return flatten(checkpoint.restore_for_evaluation(folder)[2])


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('uninterrupted')
  return folder, *run(folder)


def assert_same_run(folder, uninterrupted):
  assert rows(folder) == rows(uninterrupted[0])  # every float, to the last bit, and each step once
  a, b = final_params(folder), final_params(uninterrupted[0])
  assert set(a) == set(b)
  for path in a:
    np.testing.assert_array_equal(a[path], b[path])


def crash():
  raise RuntimeError('power failure')


def test_a_run_learns_and_leaves_its_metrics_and_its_last_checkpoints(uninterrupted):
  folder, row, said = uninterrupted
  found = metrics.read(folder)
  assert [row['step'] for row in found] == list(range(1, STEPS + 1))
  assert found[-1]['train/loss'] < found[0]['train/loss']
  assert [row['step'] for row in found if 'eval/test/accuracy' in row] == [4, 8]
  assert len(found[0]['router/block_01/load']) == 4
  assert sorted(os.listdir(folder / 'checkpoints')) == ['6', '8']
  assert os.listdir(folder / 'tensorboard')
  assert row['eval/test/accuracy'] == found[-1]['eval/test/accuracy']


def test_the_last_message_gives_results_paths_and_the_next_commands(uninterrupted):
  folder, row, said = uninterrupted
  message = '\n'.join(said)
  for part in (f'eval/test/accuracy               {row["eval/test/accuracy"]:.5g}', f'{folder}/checkpoints/8',
               f'python -m moejax.evaluate --workdir={folder}', 'Next'):
    assert part in message


@pytest.mark.parametrize('at', ['end', 'never'])
def test_a_report_of_the_evaluated_parameters_is_written_where_the_config_asks_for_one(uninterrupted, tmp_path, at):
  shutil.copytree(uninterrupted[0], tmp_path / 'run')  # complete, so that nothing is trained
  setup, said, reported = make_setup(**PARTS), [], []

  def write_report(_folder, _setup, params, _router_state, into):
    reported.append(flatten(params))
    return into / 'report'
  loop.train(dataclasses.replace(setup, report=Report(at=at)), tmp_path / 'run', said.append, write_report)
  named = [line.split()[0] for line in said]
  if at == 'end':
    assert named[-5:] == ['Checkpoint', 'Report', 'Curves', 'Evaluate', 'Next']
    for path, value in final_params(uninterrupted[0]).items():
      np.testing.assert_array_equal(reported[0][path], value)
  else:
    assert 'Report' not in named and not reported


def test_evaluation_uses_the_parameters_that_the_checkpoint_holds(uninterrupted):
  folder, row, _ = uninterrupted
  _, number, params, router_state = checkpoint.restore_for_evaluation(folder)
  assert number == STEPS
  assert make_setup(**PARTS).evaluators['test'](params, router_state) == {'accuracy': row['eval/test/accuracy']}


@pytest.mark.parametrize('number', [1, 2, 5, 7])
def test_a_run_that_crashed_resumes_as_if_it_had_not(tmp_path, uninterrupted, number):
  with pytest.raises(Exception, match='power failure'):
    run(tmp_path, StopsAt(number, crash))
  run(tmp_path)
  assert_same_run(tmp_path, uninterrupted)


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path, uninterrupted):
  before = signal.getsignal(signal.SIGINT)  # a background job's shell has it ignored
  with pytest.raises(recovery.Interrupted) as stop:
    run(tmp_path, StopsAt(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
  assert stop.value.code == 130
  assert 'Stopped after step 5 of 8' in str(stop.value) and 'checkpoints/5. The same command resumes' in str(stop.value)
  _, said = run(tmp_path)
  assert said[0] == 'Resuming after step 5 of 8.'
  assert_same_run(tmp_path, uninterrupted)
  assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_not_trained_again(tmp_path):
  first, _ = run(tmp_path)
  again, said = run(tmp_path, StopsAt(0, crash))
  assert again == {'step': STEPS, **first}
  assert 'Finished: 8 steps.' in said


def test_a_run_that_resumes_with_other_data_names_what_changed(tmp_path):
  with pytest.raises(Exception, match='power failure'):
    run(tmp_path, StopsAt(5, crash))
  pipeline = TinyPipeline()
  pipeline.fingerprint = lambda: {'examples': '65'}
  _, said = run(tmp_path, pipeline)
  assert said[0].startswith('The training data have changed since step 5: examples was 64, now 65.')


@pytest.mark.parametrize('name', ['gs://bucket/run', 'a[b]', 'file'])
def test_an_invalid_folder_is_refused_before_the_config_is_read(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').touch()
  for command in (lambda: loop.run(None, name), lambda: evaluate.run(name)):
    with pytest.raises(ConfigError, match=f'--workdir={re.escape(name)}'):
      command()
  assert os.listdir(tmp_path) == ['file']


def test_a_run_resumes_on_another_number_of_devices(tmp_path, uninterrupted, monkeypatch):
  with pytest.raises(Exception, match='power failure'):
    run(tmp_path, StopsAt(5, crash))
  setup = make_setup(devices=8, **PARTS)
  sharded = jax.jit(lambda state, batch: step.train_step(setup, state, batch))
  monkeypatch.setattr(step, 'make_train_step', lambda setup: sharded)
  row = loop.train(setup, tmp_path, lambda line: None)
  # Sums in another order: the same numbers up to rounding.
  np.testing.assert_allclose(row['train/loss'], uninterrupted[1]['train/loss'], rtol=1e-5)


# ---- batches that are not finite ------------------------------------------------------------------------------------


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
  with pytest.raises(recovery.Diverged, match='Step 8: .* It was the last step. The last good checkpoint is .*/6'):
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
  assert_same_run(tmp_path / 'crashed', (tmp_path / 'undisturbed',))
  tables = []
  for name in ('crashed', 'undisturbed'):
    with open(tmp_path / name / 'metrics.csv', newline='') as file:
      tables.append([metrics.repeatable(row) for row in csv.DictReader(file)])
  assert tables[0] == tables[1] and [row['step'] for row in tables[0]] == list('12345678')


def test_a_run_without_rollbacks_left_stops_and_names_the_bad_batch(tmp_path):
  with pytest.raises(recovery.Diverged) as stop:
    run(tmp_path, TinyPipeline(poison={4}), recovery=dict(patience=1, max_rollbacks=0))
  message = str(stop.value)
  assert "Step 5: Loss nan" in message and "The batch itself is not finite: 'image', examples [2]" in message
  assert f'The last good checkpoint is {tmp_path}/checkpoints/4' in message
  assert 'The update was not applied. No rollback is left (config.recovery.max_rollbacks=0).' in message


def test_without_a_checkpoint_to_roll_back_to_the_run_stops(tmp_path):
  with pytest.raises(recovery.Diverged, match='There is no earlier checkpoint to roll back to.'):
    run(tmp_path, TinyPipeline(poison={1}), recovery=dict(patience=1))


# ---- watching -------------------------------------------------------------------------------------------------------


def test_times_exclude_evaluation_and_the_first_step_and_include_waiting_for_data(tmp_path):
  slow_batch = StopsAt(5, lambda: time.sleep(0.3))  # of step 6
  setup = make_setup(pipeline=slow_batch, **PARTS | dict(training=dict(PARTS['training'], log_every=2),
                                                         evaluation=dict(every=3)))
  slow = lambda params, router_state: time.sleep(2) or {'accuracy': 0.}
  loop.train(dataclasses.replace(setup, evaluators={'test': slow}), tmp_path, lambda line: None)
  found = {row['step']: row for row in metrics.read(tmp_path)}
  assert [step for step in found if 'eval/test/accuracy' in found[step]] == [3, 6, 8]
  timed = {step: row for step, row in found.items() if 'time/step_seconds' in row}
  assert list(timed) == [2, 4, 6, 8]
  assert all(row['time/slowest_step_seconds'] < 2 for row in timed.values())
  assert timed[6]['time/slowest_step_seconds'] >= 0.3
  assert timed[6]['time/step_seconds'] >= 0.15  # steps 5 and 6, of 16 examples each
  assert timed[6]['time/examples_per_second'] == pytest.approx(16 / timed[6]['time/step_seconds'])


def test_the_trace_of_a_run_has_its_steps_and_no_others(tmp_path):
  _, said = run(tmp_path, profile=dict(start=3, steps=2))
  folder = tmp_path / 'profile/plugins/profile/steps_3_to_4'
  path, = folder.glob('*.trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  assert [event['args']['step_num'] for event in events if event.get('name') == 'train'] == ['3', '4']
  assert list(folder.glob('*.xplane.pb'))
  assert any(line.startswith('Profile  ') and str(tmp_path / 'profile') in line for line in said)


def test_every_metric_of_a_run_is_in_the_table_of_the_documentation(uninterrupted):
  table = (Path(__file__).parents[2] / 'docs/watching.md').read_text()
  names = re.findall(r'`([a-z_]+/[^`]+)`', table)
  patterns = [re.compile(re.sub(r'<\w+>', '.+', re.escape(name))) for name in names]
  found = {name for row in metrics.read(uninterrupted[0]) for name in row} - {'step'}
  assert len(found) > 20
  assert [name for name in sorted(found) if not any(pattern.fullmatch(name) for pattern in patterns)] == []


# ---- files and data -------------------------------------------------------------------------------------------------


def test_a_run_survives_a_checkpoint_that_cannot_be_written(tmp_path, uninterrupted, monkeypatch):
  async def no_space(self, about, folder, _save=ocp.JsonCheckpointHandler._save_fn):
    if about.get('step') == 4:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return await _save(self, about, folder)

  monkeypatch.setattr(ocp.JsonCheckpointHandler, '_save_fn', no_space)
  _, said = run(tmp_path)
  assert any('step 4 could not be written: the disk is full' in line for line in said)
  assert_same_run(tmp_path, uninterrupted)


def test_a_run_whose_last_checkpoint_cannot_be_written_does_not_claim_to_be_finished(tmp_path, monkeypatch):
  async def no_space(self, about, folder):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(ocp.JsonCheckpointHandler, '_save_fn', no_space)
  with pytest.raises(recovery.NoCheckpoint, match='The checkpoint of the last step is missing. There is no checkpoint'):
    run(tmp_path)


def test_the_rows_up_to_a_checkpoint_are_on_disk_before_it(tmp_path, monkeypatch):
  happened, save = [], checkpoint.Checkpoints.save
  monkeypatch.setattr(os, 'fsync', lambda descriptor, fsync=os.fsync: (
      fsync(descriptor), happened.append(os.readlink(f'/proc/self/fd/{descriptor}').split('/')[-1])))

  def recorded(self, state, *arguments):
    happened.append((int(state.step), metrics.read(tmp_path)[-1]['step']))
    save(self, state, *arguments)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', recorded)
  run(tmp_path)
  kept = [what for what in happened if what == 'metrics.jsonl' or isinstance(what, tuple)]
  assert kept == [what for number in (2, 4, 6, 8) for what in ('metrics.jsonl', (number, number))]
