"""Extending a run by more steps: the new learning rate is reported, or refused with what to do.

Oracles: a run of all steps from the start; learning rates computed by hand.
"""
import numpy as np
import pytest
from training_fakes import make_setup

from moejax import config_files
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.training import loop, metrics, workdir
from moejax.training.durability import checkpoint, restore
from moejax.training.setup import default_config

CONSTANT = dict(name='constant', peak=1e-3)
COSINE = dict(name='cosine', peak=1e-3)
RSQRT = dict(name='rsqrt', peak=1e-3, warmup=100)


def config(steps, schedule=COSINE, **changes):
  made = config_files.override(default_config(), {'optimizer.schedule': schedule, 'report.at': 'never'})
  return config_files.override(made, {'training.steps': steps, **changes})


def resume(folder, old, new, *checkpoints):
  """The messages when a run with the config `old` and these checkpoints resumes with `new`."""
  workdir.claim(folder, old)
  for step in checkpoints:
    (folder / 'checkpoints' / str(step)).mkdir(parents=True)
  (folder / 'checkpoints' / '999999.orbax-checkpoint-tmp').mkdir(parents=True, exist_ok=True)  # half written
  return workdir.claim(folder, new)


# ---- the learning rate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('schedule, done, rate', [
    (CONSTANT, 400, '0.001'), (CONSTANT, 800, '0.001'), (dict(CONSTANT, warmup=450), 400, '0.0008889'),
    (RSQRT, 400, '0.0005'), (RSQRT, 900, '0.0003333')])  # sqrt(100 / 400) and sqrt(100 / 900) of the peak
def test_a_schedule_that_does_not_depend_on_the_length_continues(tmp_path, schedule, done, rate):
  assert resume(tmp_path, config(900, schedule), config(1600, schedule), done // 2, done) == [
      'Resuming with another config: training.steps was 900, now 1600.',
      f'The learning rate at step {done} is {rate}, and its schedule is the same as before.']
  assert workdir.load_config(tmp_path).training.steps == 1600


def test_a_cool_down_that_has_not_begun_is_postponed(tmp_path):
  schedule = dict(RSQRT, cooldown=200)
  assert resume(tmp_path, config(800, schedule), config(1600, schedule), 400)[1:] == [
      'The learning rate at step 400 is 0.0005 as before; its schedule was for 800 steps, and is now for 1600.']


def test_a_jump_of_the_rate_is_reported_with_both_values(tmp_path):
  # Half of a cosine is half of the peak; a quarter of it (1 + cos(pi/4)) / 2 = 0.8536.
  assert resume(tmp_path, config(800), config(1600), 400)[1:] == [
      'The learning rate at step 400 jumps from 0.0005 to 0.0008536: its schedule was for 800 steps, and is now for '
      '1600.']


def test_a_run_may_be_shortened_to_steps_it_has_not_done_yet(tmp_path):
  assert resume(tmp_path, config(1600), config(800), 400)[1] == (
      'The learning rate at step 400 jumps from 0.0008536 to 0.0005: its schedule was for 1600 steps, and is now for '
      '800.')


@pytest.mark.parametrize('schedule', [COSINE, dict(COSINE, name='linear'), dict(RSQRT, cooldown=200)])
def test_a_rate_that_has_reached_its_end_does_not_rise_by_itself(tmp_path, schedule):
  with pytest.raises(ConfigError, match='schedule has ended at a learning rate of 0, and the one for 1600 steps would'):
    resume(tmp_path, config(800, schedule), config(1600, schedule), 800)
  assert workdir.load_config(tmp_path).training.steps == 800  # so that it is refused again
  with pytest.raises(ConfigError, match='another --workdir'):
    workdir.claim(tmp_path, config(1600, schedule))


def test_the_refusal_names_all_ways_to_extend_the_run(tmp_path):
  # At 600 of 800 a cosine is (1 + cos(3 pi/4)) / 2 = 0.1464 of the peak, at 600 of 1600 (1 + cos(3 pi/8)) / 2 = 0.6913.
  with pytest.raises(ConfigError) as error:
    resume(tmp_path, config(800), config(1600), 400, 600, 800)
  assert str(error.value) == (
      f'config.training.steps was 800, now 1600, and the run in {tmp_path} is finished: its cosine schedule has ended '
      'at a learning rate of 0, and the one for 1600 steps would raise it to 0.0005. Either set the rate to continue '
      f'with, e.g. --config.optimizer.schedule.peak=0.0001; or delete {tmp_path}/checkpoints/800 to resume after step '
      '600, where the rate was 0.0001464 and would be 0.0006913; or train 1600 steps in another --workdir.')
  # The first: 0.0001 * 0.5.
  said = workdir.claim(tmp_path, config(1600, dict(COSINE, peak=1e-4)))
  assert said[-1].startswith('The learning rate at step 800 jumps from 0 to 5e-05: ')


def test_the_second_way_works_and_prefers_a_checkpoint_from_before_the_cool_down(tmp_path):
  schedule = dict(RSQRT, cooldown=200)
  with pytest.raises(ConfigError, match=r'delete \S+/checkpoints/700 \S+/checkpoints/800 to resume after step 400, '
                                        'where the rate was 0.0005 and would be 0.0005'):
    resume(tmp_path, config(800, schedule), config(1600, schedule), 400, 700, 800)
  for step in (700, 800):
    (tmp_path / 'checkpoints' / str(step)).rmdir()
  assert 'is 0.0005 as before' in workdir.claim(tmp_path, config(1600, schedule))[-1]


def test_a_short_run_whose_warm_up_was_shortened_grows(tmp_path):
  """Constant after 30 steps of warm-up, which the config of full length would still be in: 60 of 100."""
  full = config(800, dict(CONSTANT, warmup=100))
  short = config_files.override(full, {'training.steps': 60})
  assert resume(tmp_path, short, full, 60) == [
      'Resuming with another config: optimizer.schedule.warmup was 30, now 100.',
      'Resuming with another config: training.steps was 60, now 800.',
      'The learning rate at step 60 jumps from 0.001 to 0.0006: its schedule was for 60 steps, and is now for 800.']


# ---- keys that may change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('steps', [399, 400])
def test_steps_do_not_shrink_to_those_already_done(tmp_path, steps):
  with pytest.raises(ConfigError, match=f'was 800, now {steps}, and the run in .* has done 400. Set more than 400, or'):
    resume(tmp_path, config(800), config(steps), 200, 400)
  assert workdir.load_config(tmp_path).training.steps == 800


def test_the_schedule_changes_with_the_length_alone(tmp_path):
  """A folder that is used twice in a sweep over learning rates is refused, not resumed."""
  with pytest.raises(ConfigError, match='optimizer.schedule.peak was 0.001, now 0.002. Choose another --workdir'):
    resume(tmp_path, config(800), config(800, dict(COSINE, peak=2e-3)), 800)


@pytest.mark.parametrize('change', [{'seed': 1}, {'optimizer.weight_decay': 0.5}, {'training.average': 0.9},
                                    {'training.accumulate': 2}])
def test_other_keys_do_not_change_with_it(tmp_path, change):
  key, = change
  with pytest.raises(ConfigError, match=f'holds a run with another config: {key} was'):
    resume(tmp_path, config(800, CONSTANT), config(1600, CONSTANT, **change), 400)


def test_before_the_first_checkpoint_there_is_no_rate_to_continue(tmp_path):
  assert resume(tmp_path, config(800), config(60)) == ['Resuming with another config: training.steps was 800, now 60.']


# ---- the run --------------------------------------------------------------------------------------------------------


def train(folder, steps, schedule):
  """Runs the tiny model; returns its messages."""
  setup, said = make_setup(training=dict(steps=steps), evaluate=True, optimizer_config=dict(
      name='adamw', weight_decay=0.1, clip=1., schedule=schedule)), []
  said += workdir.claim(folder, setup.config)
  loop.train(setup, folder, said.append)
  return said


def rows(folder):
  """The reproducible metrics of training at each step, without evaluation, which is due at the end of a run."""
  return [{name: value for name, value in metrics.repeatable(row).items() if not name.startswith('eval/')}
          for row in metrics.read(folder)]


def test_a_finished_run_that_is_extended_is_the_longer_run_to_the_last_bit(tmp_path):
  schedule = dict(name='rsqrt', peak=0.02, warmup=3)
  train(tmp_path / 'long', 8, schedule)
  train(tmp_path / 'extended', 5, schedule)  # not a multiple of checkpoint.every
  said = train(tmp_path / 'extended', 8, schedule)
  assert said[0] == 'Resuming with another config: training.steps was 5, now 8.'
  assert said[1].endswith('and its schedule is the same as before.')
  assert said[2] == 'Resuming after step 5 of 8.' and 'Finished: 8 steps.' in said
  assert rows(tmp_path / 'extended') == rows(tmp_path / 'long')
  long, extended = (flatten(restore.restore_for_evaluation(tmp_path / name)[2]) for name in ('long', 'extended'))
  for path in long:
    np.testing.assert_array_equal(extended[path], long[path])


def test_the_reported_learning_rate_is_that_of_the_next_step(tmp_path):
  """Metrics of step 6 have the rate that takes the parameters of step 5 further: at 5 of 8, (1 + cos(5 pi/8)) / 2."""
  train(tmp_path, 6, dict(name='cosine', peak=0.02))
  # As if stopped after step 4: the last checkpoint is gone.
  checkpoint.shutil.rmtree(tmp_path / 'checkpoints' / '6')
  said = train(tmp_path, 8, dict(name='cosine', peak=0.02))
  # 0.02 (1 + cos(4 pi/6)) / 2 = 0.005, and 0.02 (1 + cos(4 pi/8)) / 2 = 0.01
  assert said[1].startswith('The learning rate at step 4 jumps from 0.005 to 0.01: ')
  np.testing.assert_allclose(rows(tmp_path)[4]['train/learning_rate'], 0.01, rtol=1e-6)
