"""What may change in the config when a run resumes, and what another length does to the learning rate.

A learning rate belongs to a step and is computed from the config, so a run that resumes with another length follows its
new schedule from there on. Where the schedule does not depend on the length (constant, rsqrt without cool-down), the
extended run is the run that was asked for the larger number from the start, to the last bit.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moejax.config import ConfigError
from moejax.training import optimizer

# What is written, where it is computed and what is done about trouble; not what is learned.
FREE = ('training.log_every', 'checkpoint', 'evaluation', 'recovery', 'mesh', 'sharding', 'report', 'data.threads',
        'loggers', 'profile')
# The length; with it, and only with it, the schedule of the learning rate.
_STEPS, _SCHEDULE = 'training.steps', 'optimizer.schedule'
# Keys of a schedule that follow the length, in `moejax.shorten`.
_PHASES = ('warmup', 'cooldown')


def refused(keys: Sequence[str]) -> list[str]:
  """Of the `keys` that differ between the config of a run and the one to resume with, those that may not."""
  allowed = (*FREE, _STEPS, *((_SCHEDULE,) if _STEPS in keys else ()))
  return [key for key in keys if not any(key == one or key.startswith(f'{one}.') for one in allowed)]


def follow_length(old: Mapping, new: Mapping, checkpoints: Sequence[int], folder: Path) -> list[str]:
  """What another `training.steps` does to the learning rate after the last of `checkpoints`: a sentence, or none.

  Args:
    old, new: the config of the run in `folder`, and the one to resume with.
    checkpoints: steps of its checkpoints.

  Raises:
    ConfigError: as many steps are done as `new` asks for, or the learning rate had reached its end and would rise again
      without having been set anew.
  """
  done, before, after = max(checkpoints, default=0), old['training']['steps'], new['training']['steps']
  if before == after or not done:
    return []
  if after <= done:  # a last step is evaluated, and those that are done may not be
    raise ConfigError(f'config.training.steps was {before}, now {after}, and the run in {folder} has done {done}. Set '
                      f'more than {done}, or choose another --workdir.')
  # Schedules change their course at most at their ends: these and some steps between tell whether two are equal.
  steps = np.array([*np.linspace(done, max(before, after), 1000, dtype=int), before, after])
  old_rates, new_rates = _rates(old, steps), _rates(new, steps)
  if done >= before and new_rates[0] > old_rates[0] and not _set_anew(old, new):
    raise ConfigError(_ended(old, new, checkpoints, folder))
  if new_rates[0] != old_rates[0]:
    return [f'The learning rate at step {done} jumps from {old_rates[0]:.4g} to {new_rates[0]:.4g}: its schedule was '
            f'for {before} steps, and is now for {after}.']
  if (new_rates != old_rates).any():
    return [f'The learning rate at step {done} is {new_rates[0]:.4g} as before; its schedule was for {before} steps, '
            f'and is now for {after}.']
  return [f'The learning rate at step {done} is {new_rates[0]:.4g}, and its schedule is the same as before.']


def _ended(old, new, checkpoints, folder):
  """Why the run is not extended, and the ways to do it."""
  done, before, after = max(checkpoints), old['training']['steps'], new['training']['steps']
  schedule, rates = new['optimizer']['schedule'], lambda step: (*_rates(old, [step]), *_rates(new, [step]))
  ways = [f'set the rate to continue with, e.g. --config.optimizer.schedule.peak={schedule["peak"] / 10:.4g}']
  if earlier := [step for step in checkpoints if step < before]:
    best = max(earlier, key=lambda step: (len(set(rates(step))) == 1, step))
    folders = ' '.join(str(folder / 'checkpoints' / str(step)) for step in sorted(checkpoints) if step > best)
    ways.append('delete {} to resume after step {}, where the rate was {:.4g} and would be {:.4g}'.format(
        folders, best, *rates(best)))
  ways.append(f'train {after} steps in another --workdir')
  return ('config.training.steps was {}, now {}, and the run in {} is finished: its {} schedule has ended at a '
          'learning rate of {:.4g}, and the one for {} steps would raise it to {:.4g}. Either {}.').format(
              before, after, folder, schedule['name'], *rates(done)[:1], after, *rates(done)[1:], '; or '.join(ways))


def _rates(config: Mapping, steps: Sequence[int] | np.ndarray) -> np.ndarray:
  """<float32>[len(steps)] Learning rates of these steps."""
  schedule = optimizer.SCHEDULES.build(config['optimizer']['schedule'], 'config.optimizer.schedule',
                                       steps=config['training']['steps'])
  return np.asarray(schedule(np.asarray(steps)))


def _set_anew(old: Mapping, new: Mapping) -> bool:
  """Whether the schedules differ in more than what follows the length by itself."""
  old, new = ({key: value for key, value in config['optimizer']['schedule'].items() if key not in _PHASES}
              for config in (old, new))
  return old != new
