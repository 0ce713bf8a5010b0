"""Metrics of a run: one JSON object per line in metrics.jsonl, and the other loggers of config.loggers.

    {"step": 50, "train/loss": 1.2, "router/block_03/load": [0.25, 0.25, 0.5, 0.0], "eval/test/accuracy": 0.61}
"""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import buckets, json_lines
from moejax.parallel import processes
from moejax.training.loggers import LOGGERS, JsonLines, Opening


class MetricsWriter:
  """Appends rows, after dropping those later than `restored_step`, so that no step appears twice.

  Of several processes, only the first writes.

  Args:
    workdir: of the run.
    restored_step: last step whose row is kept.
    say: receives a message if existing rows cannot be read or removed.
    loggers: names of `loggers.LOGGERS`; 'jsonl' is always added.
    config: of the run, for loggers that show it.

  Attributes:
    kept: the existing rows that were kept.
    last_row: the last of them; {} for a new run.

  Raises:
    ConfigError: a logger cannot start.
  """

  def __init__(self, workdir: str | Path, restored_step: int, say: Callable[[str], None] = print,
               loggers: Sequence[str] = (), config: Mapping[str, Any] = {}):
    workdir = Path(workdir)
    self.kept = [row for row in read(workdir, say) if row['step'] <= restored_step]
    self.last_row = self.kept[-1] if self.kept else {}
    opening = Opening(workdir, dict(config), self.kept, restored_step, say)
    names = dict.fromkeys(['jsonl', *loggers]) if jax.process_index() == 0 else ()
    with processes.together('open its loggers'):
      self._loggers = [LOGGERS[name](opening) for name in names]

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Writes `row` (scalars, and lists of them) measured at `step`. A kill of this process loses none of it."""
    for logger in self._loggers:
      logger.write(step, row)

  def where(self) -> list[str]:
    """Where the rows are, metrics.jsonl first, and commands that show them."""
    return [place for logger in self._loggers if (place := logger.where())]

  def sync(self) -> None:
    """Returns when all rows are on disk, or in the bucket that is mounted: a crash of the machine loses none of them."""
    for logger in self._loggers[:1]:  # metrics.jsonl, in the process that writes
      logger.sync()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    for logger in self._loggers:
      logger.close(failed=kind is not None)


def read(workdir: str | Path, say: Callable[[str], None] = lambda sentence: None) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl in order; [] if there is none. `say` receives a message about unreadable lines."""
  return json_lines.read(buckets.path(workdir) / JsonLines.FILE, _is_row, say)


def fetch(metrics: dict[str, jax.Array]) -> dict[str, Any]:
  """Device arrays as numbers and lists of numbers; waits until they are computed."""
  return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


def repeatable(row: Mapping[str, Any]) -> dict[str, Any]:
  """The part of a row that the same run reproduces bit for bit: all but times and memory."""
  return {name: value for name, value in row.items() if not name.startswith(('time/', 'memory/'))}


def _is_row(row):
  return type(row.get('step')) is int and all(map(_is_value, row.values()))


def _is_value(value):
  return all(map(_is_value, value)) if isinstance(value, list) else value is None or isinstance(value, (int, float))
