"""Metrics of a run: one JSON object a line in metrics.jsonl, and TensorBoard.

    {"step": 50, "train/loss": 1.2, "router/block_03/load": [0.25, 0.25, 0.5, 0.0], "eval/test/accuracy": 0.61}
"""
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX

from moejax import json_lines
from moejax.training.workdir import write_atomically

_FILE = 'metrics.jsonl'


class MetricsWriter:
  """Appends rows. Starting after `restored_step` first drops the rows after it, so that no step is there twice.

  Of several processes the first writes.

  Args:
    workdir: of the run.
    restored_step: the last of the rows to keep.
    say: receives a sentence where rows that were there cannot be read.

  Attributes:
    kept: the rows that were there already.
    last_row: the last of them, {} for a new run.
  """

  def __init__(self, workdir: str | Path, restored_step: int, say: Callable[[str], None] = print):
    workdir = Path(workdir)
    self.kept = [row for row in read(workdir, say) if row['step'] <= restored_step]
    self.last_row = self.kept[-1] if self.kept else {}
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    write_atomically(workdir / _FILE, ''.join(map(json_lines.line, self.kept)))
    self._file = open(workdir / _FILE, 'a')
    self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=restored_step + 1)

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Writes `row` (scalars, and lists of them) as that of `step`. A kill of this process loses none of it."""
    if not self._writes:
      return
    self._file.write(json_lines.line({'step': step, **row}))
    self._file.flush()
    for name, value in row.items():
      if not np.isfinite(value).all():
        continue  # TensorBoard has no place for it, and would warn at every row.
      if isinstance(value, list):
        # A curve for each of 100 experts cannot be read; the range can.
        self._board.add_scalar(f'{name}/smallest', np.min(value), step)
        self._board.add_scalar(f'{name}/largest', np.max(value), step)
      else:
        self._board.add_scalar(name, value, step)
    self._board.flush()

  def sync(self) -> None:
    """Returns when all rows are on disk, or in the bucket that is mounted: a crash of the machine loses none of them."""
    if self._writes:
      os.fsync(self._file.fileno())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if not self._writes:
      return
    self._file.close()
    self._board.close()


def read(workdir: str | Path, say: Callable[[str], None] = lambda sentence: None) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl in order; [] if there is none. `say` hears of lines that cannot be read."""
  return json_lines.read(Path(workdir) / _FILE, _is_row, say)


def fetch(metrics: dict[str, jax.Array]) -> dict[str, Any]:
  """Arrays on the device as numbers and lists of numbers; waits until they are computed."""
  return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


def _is_row(row):
  return type(row.get('step')) is int and all(map(_is_value, row.values()))


def _is_value(value):
  return all(map(_is_value, value)) if isinstance(value, list) else value is None or isinstance(value, (int, float))
