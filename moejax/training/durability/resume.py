"""Which keys of the config may change when a run resumes, and how a new length changes the learning rate.

A learning rate belongs to a step and is computed from the config, so a run that resumes with a new length follows its
new schedule from there on. Where the schedule does not depend on the length (constant, rsqrt without cool-down), the
extended run is bit-identical to a run started with the larger number.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from moejax.config import ConfigError
from moejax.training.schedules import SCHEDULES

# They change what is written, where it is computed and how failures are handled, not what is learned.
FREE = ('training.log_every', 'checkpoint', 'evaluation', 'recovery', 'mesh', 'sharding', 'report', 'loggers',
        'profile', 'data.threads')
# The schedule of the learning rate may change only together with the length.
_STEPS, _SCHEDULE = 'training.steps', 'optimizer.schedule'
# config.init of configs that are older than this section.
DRAWN = {'name': 'random'}
# Keys of a schedule that follow the length, in `moejax.shorten`.
_PHASES = ('warmup', 'cooldown')


def refused(keys: Sequence[str]) -> list[str]:
  """The keys that may not change on resume, out of `keys`, which differ between the old and the new config."""
  allowed = (*FREE, _STEPS, *((_SCHEDULE,) if _STEPS in keys else ()))
  return [key for key in keys if not any(key == one or key.startswith(f'{one}.') for one in allowed)]


def completed(old: ConfigDict) -> ConfigDict:
  """The config of a run, with the sections that configs have had since it was started."""
  return ConfigDict({'init': DRAWN, **old})


def follow_length(old: Mapping, new: Mapping, checkpoints: Sequence[int], folder: Path) -> list[str]:
  """A sentence on how a new `training.steps` changes the learning rate after the last checkpoint; [] if there is none.

  Args:
    old, new: the config of the run in `folder`, and the one to resume with.
    checkpoints: steps of its checkpoints.

  Raises:
    ConfigError: the steps that `new` asks for are already done, or the old schedule has ended and the new length would
      raise the learning rate again, although `new` does not set the schedule.
  """
  done, before, after = max(checkpoints, default=0), old['training']['steps'], new['training']['steps']
  if before == after or not done:
    return []
  if after <= done:  # the last step is evaluated; steps already done may not have been
    raise ConfigError(f'config.training.steps was {before}, now {after}, and the run in {folder} has done {done}. Set '
                      f'more than {done}, or choose another --workdir.')
  # Schedules bend at most where they end, so the ends and some steps between show whether two are equal.
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
  """Why the run is not extended, and the ways to extend it."""
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
  schedule = SCHEDULES.build(config['optimizer']['schedule'], 'config.optimizer.schedule',
                             steps=config['training']['steps'])
  return np.asarray(schedule(np.asarray(steps)))


def _set_anew(old: Mapping, new: Mapping) -> bool:
  """Whether the schedules differ in a key that does not follow the length by itself."""
  old, new = ({key: value for key, value in config['optimizer']['schedule'].items() if key not in _PHASES}
              for config in (old, new))
  return old != new
