"""The loop: the files of a run, and that every way of stopping and resuming gives the same run.

Oracle: an uninterrupted run of the same set-up. Processes that are killed are in test_train_command.py.
"""
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
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_runs import PARTS, STEPS, assert_same_run, compiled_once, crash, final_params, run
from training_fakes import StopsAt, TinyPipeline, make_setup

from moejax import evaluate
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.training import loop, metrics, step
from moejax.training.durability import checkpoint, restore, stop_reasons
from moejax.training.setup import Report

@pytest.fixture(scope='module', autouse=True)
def one_step():
  with compiled_once():
    yield


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('uninterrupted')
  return folder, *run(folder)


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
  _, number, params, router_state = restore.restore_for_evaluation(folder)
  assert number == STEPS
  assert make_setup(**PARTS).evaluators['test'](params, router_state) == {'accuracy': row['eval/test/accuracy']}


@pytest.mark.parametrize('number', [1, 2, 5, 7])
def test_a_run_that_crashed_resumes_as_if_it_had_not(tmp_path, uninterrupted, number):
  with pytest.raises(Exception, match='power failure'):
    run(tmp_path, StopsAt(number, crash))
  run(tmp_path)
  assert_same_run(tmp_path, uninterrupted[0])


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path, uninterrupted):
  before = signal.getsignal(signal.SIGINT)  # a background job's shell has it ignored
  with pytest.raises(stop_reasons.Interrupted) as stop:
    run(tmp_path, StopsAt(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
  assert stop.value.code == 130
  assert 'Stopped after step 5 of 8' in str(stop.value) and 'checkpoints/5. The same command resumes' in str(stop.value)
  _, said = run(tmp_path)
  assert said[0] == 'Resuming after step 5 of 8.'
  assert_same_run(tmp_path, uninterrupted[0])
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
  assert_same_run(tmp_path, uninterrupted[0])


def test_a_run_whose_last_checkpoint_cannot_be_written_does_not_claim_to_be_finished(tmp_path, monkeypatch):
  async def no_space(self, about, folder):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(ocp.JsonCheckpointHandler, '_save_fn', no_space)
  with pytest.raises(stop_reasons.NoCheckpoint, match='The checkpoint of the last step is missing. There is no checkpoint'):
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
