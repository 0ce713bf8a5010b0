"""Setting `training.steps` alone makes a whole short run: warm-up and cool-down of the learning rate fit into it.

    shortened(config, {'training.steps': 60})  ->  {'optimizer.schedule.warmup': 30}

Intervals stay as they are: what is due every 200 steps is due at the end of a run of 60.
"""
from collections.abc import Mapping
from typing import Any

_STEPS = 'training.steps'
_PHASES = ('optimizer.schedule.warmup', 'optimizer.schedule.cooldown')


def shortened(config: Mapping, given: Mapping[str, Any]) -> dict[str, int]:
  """{path: steps} of the phases that together would take more than half of a run that `given` makes shorter.

  They keep their proportions. A run that is not shorter than `config` says has the phases of `config`.

  Args:
    config: as its file makes it.
    given: {path: value} of the keys that are set; a phase among them, or in a group among them, stays as it is set.
  """
  before, steps = _at(config, _STEPS), given.get(_STEPS)
  if type(before) is not int or type(steps) is not int or not 0 < steps < before:  # for constructors to refuse
    return {}
  phases = {path: _at(config, path) for path in _PHASES if not _is_set(path, given)}
  phases = {path: length for path, length in phases.items() if type(length) is int}
  room = max(steps // 2 - sum(given[path] for path in _PHASES if type(given.get(path)) is int), 0)
  total = sum(phases.values())
  return {path: length * room // total for path, length in phases.items()} if total > room else {}


def _at(config: Any, path: str) -> Any:
  for key in path.split('.'):
    if not hasattr(config, 'get'):
      return None
    config = config.get(key)
  return config


def _is_set(path: str, given: Mapping[str, Any]) -> bool:
  return any(path == other or path.startswith(f'{other}.') for other in given)
