"""Metrics of a run: one JSON object a line in metrics.jsonl, and TensorBoard.

    {"step": 50, "train/loss": 1.2, "router/block_03/load": [0.25, 0.25, 0.5, 0.0], "eval/test/accuracy": 0.61}
"""
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX

from moejax.training.workdir import write_atomically


class MetricsWriter:
  """Appends rows. Starting after `restored_step` first drops the rows after it, so that no step is there twice.

  Of several processes the first writes.

  Attributes:
    kept: the rows that were there already.
    last_row: the last of them, {} for a new run.
  """

  def __init__(self, workdir: str | Path, restored_step: int):
    workdir = Path(workdir)
    self.kept = [row for row in read(workdir) if row['step'] <= restored_step]
    self.last_row = self.kept[-1] if self.kept else {}
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    write_atomically(workdir / 'metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in self.kept))
    self._file = open(workdir / 'metrics.jsonl', 'a')
    self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=restored_step + 1)

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Writes `row` (scalars, and lists of them) as that of `step`. It is on disk when this returns."""
    if not self._writes:
      return
    self._file.write(json.dumps({'step': step, **jax.tree.map(_finite_or_none, row)}) + '\n')
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

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if not self._writes:
      return
    self._file.close()
    self._board.close()


def read(workdir: str | Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl in order; [] if there is none. A last line that a kill cut off is left out."""
  path = Path(workdir) / 'metrics.jsonl'
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def fetch(metrics: dict[str, jax.Array]) -> dict[str, Any]:
  """Arrays on the device as numbers and lists of numbers; waits until they are computed."""
  return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


def _finite_or_none(value):
  # NaN and infinity are no JSON.
  return None if isinstance(value, float) and not math.isfinite(value) else value
