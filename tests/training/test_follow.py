"""A run is followed from outside: every checkpoint evaluated once, in order, and nothing of the run touched.

Oracle: what the run itself measured at the same steps. Nothing sleeps: where the follower would, the world moves on.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from training_fakes import make_setup

from moejax import evaluate
from moejax.config import ConfigError
from moejax.evaluation import log
from moejax.training import follow, loop, metrics, setup, workdir
from moejax.training.durability import restore
from moejax.training.durability.stop_reasons import Interrupted, NoCheckpoint

STEPS = 8


class World:
  """A run without a model: `write` and `delete` checkpoints; `events` happen one by one whenever the follower waits."""

  def __init__(self, folder, monkeypatch):
    self.folder, self.said, self.evaluated, self.unreadable, self.events = folder, [], [], set(), []
    monkeypatch.setattr(follow, '_sleep', lambda seconds, interruption: self.events.pop(0)())

  def begin(self):
    workdir.claim(self.folder, make_setup().config)  # of 8 steps

  def write(self, *steps):
    for number in steps:
      (self.folder / 'checkpoints' / str(number)).mkdir(parents=True, exist_ok=True)

  def delete(self, *steps):
    for number in steps:
      shutil.rmtree(self.folder / 'checkpoints' / str(number))

  def evaluate(self, number):
    if number in self.unreadable or not (self.folder / 'checkpoints' / str(number)).exists():
      raise NoCheckpoint(f'{number} is damaged.')
    self.evaluated.append(number)

  def follow(self, done=()):
    follow.run(self.folder, self.evaluate, done, 30., self.said.append)
    return self.evaluated


@pytest.fixture
def world(tmp_path, monkeypatch):
  return World(tmp_path, monkeypatch)


def test_it_waits_for_the_run_and_takes_checkpoints_in_order_as_they_appear(world):
  world.events = [world.begin, lambda: world.write(4, 2), lambda: None, lambda: world.write(6), lambda: world.write(8)]
  assert world.follow() == [2, 4, 6, 8]
  assert world.said == [  # once each, however often it looks
      f'Waiting for a run to start in {world.folder}; looking every 30 s.',
      f'Waiting for a checkpoint after step 0 of 8 in {world.folder}; looking every 30 s.',
      f'Waiting for a checkpoint after step 4 of 8 in {world.folder}; looking every 30 s.',
      f'Waiting for a checkpoint after step 6 of 8 in {world.folder}; looking every 30 s.']


def test_what_was_evaluated_before_is_not_again(world):
  world.begin()
  world.write(2, 4, 6, 8)
  assert world.follow(done=[2, 6]) == [4, 8]
  assert world.said == []


def test_a_run_that_is_evaluated_to_its_end_leaves_nothing_to_wait_for(world):
  world.begin()
  world.write(6, 8)
  assert world.follow(done=[6, 8]) == []


def test_names_that_no_complete_checkpoint_has_are_not_looked_at(world):
  world.begin()
  world.write('2.orbax-checkpoint-tmp', 'damaged-4', 8)
  assert world.follow() == [8]


def test_one_that_is_deleted_before_its_turn_or_while_it_is_read_is_skipped_and_that_is_said(world):
  world.begin()
  world.write(2, 4, 6)
  evaluate = world.evaluate

  def meanwhile(number):
    if number == 2:
      world.delete(4)  # its turn would be next
      world.write(8)
    if number == 6:
      world.delete(6)  # now it is read
    evaluate(number)
  world.evaluate = meanwhile
  assert world.follow() == [2, 8]
  assert [re.match(r'The checkpoint of step (\d) was deleted before it was evaluated: skipped', sentence)[1]
          for sentence in world.said] == ['4', '6']


def test_one_that_gets_its_name_before_it_is_whole_is_tried_once_more(world):
  world.begin()
  world.write(2, 8)
  world.unreadable = {2}
  world.events = [world.unreadable.clear]
  assert world.follow() == [2, 8]
  assert world.said == ['The checkpoint of step 2 cannot be read yet; trying once more in 30 s: 2 is damaged.']


def test_one_that_stays_damaged_is_skipped_and_that_of_the_last_step_ends_in_a_sentence(world):
  world.begin()
  world.write(2, 4, 8)
  world.unreadable = {2, 8}
  world.events = [lambda: None] * 2
  with pytest.raises(NoCheckpoint, match='8 is damaged'):
    world.follow()
  assert world.evaluated == [4]
  assert world.said[1] == 'Skipped step 2: 2 is damaged.'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_evaluation_under_way_with_its_code(world, number):
  world.begin()
  world.write(2, 4)
  evaluate = world.evaluate

  def signalled(number_of_step):
    os.kill(os.getpid(), number)
    evaluate(number_of_step)
  world.evaluate = signalled
  with pytest.raises(Interrupted, match='The same command evaluates the rest') as stopped:
    world.follow()
  assert stopped.value.code == 128 + number and world.evaluated == [2]


def test_a_signal_ends_the_waiting(tmp_path, monkeypatch):
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(time, 'sleep', sleep)
  with pytest.raises(Interrupted):
    follow.run(tmp_path, None, (), 600., lambda sentence: None)
  assert slept == [1.]


# ---- with a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder of a run of 8 steps that evaluates and saves every other, keeps all, and evaluates an average."""
  folder = tmp_path_factory.mktemp('run')
  run = tiny(1)
  workdir.claim(folder, run.config)
  loop.train(run, folder, lambda sentence: None)
  return folder


def tiny(devices):
  return make_setup(devices, evaluate=True, training=dict(steps=STEPS, average=0.5), evaluation=dict(every=2),
                    checkpoint=dict(every=2, keep=9))


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(setup, 'prepare', lambda config: tiny(1))
  shutil.copytree(trained, tmp_path / 'run')
  return tmp_path / 'run'


def files(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.name != log.FILE and path != folder}


def test_every_number_is_bit_for_bit_what_the_run_measured_and_the_run_is_not_touched(run_dir):
  (run_dir / 'lock').write_text('of the run, which still trains')
  before = files(run_dir)
  evaluate.follow(run_dir, say=lambda sentence: None)
  measured = {row['step']: row['metrics'] for row in log.read(run_dir)}
  by_the_run = {row['step']: {'test/accuracy': row['eval/test/accuracy']} for row in metrics.read(run_dir)
                if 'eval/test/accuracy' in row}
  assert list(measured) == [2, 4, 6, 8] and measured == by_the_run
  assert files(run_dir) == before


def test_eight_devices_follow_a_run_of_one(run_dir, monkeypatch):
  monkeypatch.setattr(setup, 'prepare', lambda config: tiny(8))
  evaluate.follow(run_dir, say=lambda sentence: None)
  by_the_run = [row['eval/test/accuracy'] for row in metrics.read(run_dir) if 'eval/test/accuracy' in row]
  np.testing.assert_allclose([row['metrics']['test/accuracy'] for row in log.read(run_dir)], by_the_run, atol=1 / 64)


def test_it_is_prepared_once_for_all_checkpoints(run_dir, monkeypatch):
  prepared = []
  monkeypatch.setattr(setup, 'prepare', lambda config: prepared.append(config) or tiny(1))
  evaluate.follow(run_dir, say=lambda sentence: None)
  assert len(prepared) == 1 and len(log.read(run_dir)) == 4


def test_a_second_command_evaluates_what_the_first_did_not_and_other_overrides_count_by_themselves(run_dir):
  log.append(run_dir, 2, {}, {'test/accuracy': 0.})
  log.append(run_dir, 4, {'data.batch_size': (8,)}, {'test/accuracy': 0.})
  with open(run_dir / log.FILE, 'a') as file:
    file.write('{"step": 6, "overrides": {}, "metr')  # a kill cut it off
  for _ in range(2):
    evaluate.follow(run_dir, say=lambda sentence: None)
  assert [row['step'] for row in log.read(run_dir) if not row['overrides']] == [2, 4, 6, 8]
  assert log.steps(run_dir, {'data.batch_size': (8,)}) == {4}


def test_a_key_that_changes_nothing_is_refused_before_anything_is_waited_for(run_dir):
  shutil.rmtree(run_dir / 'checkpoints')
  with pytest.raises(ConfigError, match='config.optimizer.name has no effect on an evaluation'):
    evaluate.follow(run_dir, {'optimizer.name': 'sgd'}, say=lambda sentence: None)


def test_a_checkpoint_of_which_a_file_is_gone_is_named_and_no_other_is_evaluated_in_its_place(run_dir):
  (run_dir / 'checkpoints' / '8' / 'checksums.json').unlink()
  with pytest.raises(NoCheckpoint, match=r'checkpoints/8 cannot be read \(Damaged: checksums.json cannot be read\)'):
    restore.restore_for_evaluation(run_dir, 8)


@pytest.mark.slow
def test_a_follower_that_is_started_first_stopped_and_started_again_measures_what_the_run_does(tmp_path):
  """Three commands at once, as on a cluster: the run on two devices, the follower on one."""
  config = os.path.join(os.path.dirname(__file__), 'digits_config.py')
  def start(*command, devices):
    return subprocess.Popen([sys.executable, '-m', *command, f'--workdir={tmp_path}'], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)}, stderr=subprocess.STDOUT)
  follower = start('moejax.evaluate', '--follow', '--every=0.1', devices=1)
  assert 'Waiting for a run to start' in follower.stdout.readline()
  run = start('moejax.train', f'--config={config}:20', '--config.checkpoint.every=4', '--config.checkpoint.keep=9',
              '--config.evaluation.every=4', devices=2)
  while not log.read(tmp_path):
    time.sleep(0.05)
  follower.terminate()
  said, _ = follower.communicate(timeout=300)
  assert follower.returncode == 143 and 'The same command evaluates the rest' in said, said
  again = start('moejax.evaluate', '--follow', '--every=0.1', devices=1)
  assert again.wait(timeout=300) == 0 and run.wait(timeout=300) == 0
  measured = {row['step']: row['metrics'] for row in log.read(tmp_path)}
  rows = [json.loads(line) for line in (tmp_path / log.FILE).read_text().splitlines()]
  assert [row['step'] for row in rows] == [4, 8, 12, 16, 20]
  for row in metrics.read(tmp_path):
    for name, value in measured.get(row['step'], {}).items():
      np.testing.assert_allclose(value, row[f'eval/{name}'], rtol=1e-4, atol=1e-4)
