"""Warm-up and cool-down of a run shortened by a command fit into half of it. Oracle: shares computed by hand."""
import pytest
from ml_collections import ConfigDict

from moejax import config_files
from moejax.config import ConfigError
from moejax.training.schedules import SCHEDULES


def schedule(given, steps=800, **phases):
  """The schedule of a config that has these phases, after a command has set the keys `given`."""
  config = ConfigDict(dict(training=dict(steps=steps), optimizer=dict(schedule=dict(name='rsqrt', peak=1., **phases))))
  return config_files.override(config, given).optimizer.schedule.to_dict()


@pytest.mark.parametrize('steps, warmup', [
    (800, 500), (1600, 500),  # no shorter than the config says: as it says
    (799, 399), (60, 30), (7, 3), (1, 0)])
def test_warm_up_takes_at_most_half_of_a_shorter_run(steps, warmup):
  assert schedule({'training.steps': steps}, warmup=500)['warmup'] == warmup


def test_a_shorter_run_that_has_room_for_its_warm_up_keeps_it():
  assert schedule({'training.steps': 200}, warmup=100)['warmup'] == 100


def test_warm_up_and_cool_down_share_the_half_as_they_did():
  found = schedule({'training.steps': 60}, steps=4000, warmup=100, cooldown=500)  # 1 : 5 of 30
  assert (found['warmup'], found['cooldown']) == (5, 25)


def test_a_phase_that_is_set_stays_and_the_other_takes_the_rest():
  found = schedule({'training.steps': 60, 'optimizer.schedule.warmup': 20}, steps=4000, warmup=100, cooldown=500)
  assert (found['warmup'], found['cooldown']) == (20, 10)
  found = schedule({'training.steps': 60, 'optimizer.schedule.cooldown': 50}, steps=4000, warmup=100, cooldown=500)
  assert (found['warmup'], found['cooldown']) == (0, 50)


def test_a_schedule_that_is_set_as_a_group_stays():
  group = dict(name='constant', peak=1., warmup=50)
  assert schedule({'training.steps': 60, 'optimizer.schedule': group}, warmup=100) == group


@pytest.mark.parametrize('steps', ['many', 0, -3, 2.5, None, True])
def test_invalid_steps_change_nothing(steps):
  assert schedule({'training.steps': steps}, warmup=100)['warmup'] == 100


def test_keys_that_contradict_each_other_are_refused():
  given = {'training.steps': 100, 'optimizer.schedule.warmup': 500}
  with pytest.raises(ConfigError, match='500 steps of warm-up .* must be fewer than the 100 of config.training.steps'):
    SCHEDULES.build(schedule(given, warmup=10), 'config.optimizer.schedule', steps=100)
