"""Which checkpoint of a run is meant: the last, the best or the one of a step."""
from pathlib import Path
from typing import Any

from moejax.config import ConfigError
from moejax.training import kept
from moejax.training import metrics as metrics_lib
from moejax.training import workdir as workdir_lib


def find(workdir: str | Path, step: int | str) -> int | None:
  """The step that 'last' (None: the latest readable one), 'best' by config.checkpoint.metric, or an int names.

  Raises:
    ConfigError: it is none of these, or the best is not known.
  """
  if step == 'last':
    return None
  if step != 'best':
    if not str(step).isdigit():
      raise ConfigError(f"step must be an int, 'last' or 'best', not {step!r}.")
    return int(step)
  config: Any = workdir_lib.load_config(workdir)
  options = config.checkpoint
  steps = kept.complete(workdir)
  scores = {row['step']: row[options.metric] for row in metrics_lib.read(workdir)
            if row['step'] in steps and row.get(options.metric) is not None}
  if not scores:
    raise ConfigError(f'Cannot determine the best checkpoint of {workdir}: config.checkpoint.metric is '
                      f"{options.metric!r}, and no checkpoint has a value for it. Take the 'last' or one of the steps: "
                      f'{", ".join(map(str, sorted(steps))) or "there are none"}.')
  return (max if options.mode == 'max' else min)(scores, key=lambda step: scores[step])
