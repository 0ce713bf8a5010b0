"""Readers: batches are read in shares, so that a process need not read the rows of another."""
from collections.abc import Callable

import grain
import numpy as np


class Readers(grain.DatasetIterator):
  """Rows of batches that are the concatenated equal shares of `count` readers.

  The contents of a batch depend on the number of readers, but not on the rows that a process requests. Readers of no
  requested row are not started. The state is `{reader: its state}`: the states of all processes together cover all
  readers, and any process can resume from them.

  Args:
    start: (reader) -> iterator over its share of every batch.
    count: number of readers; divides `batch_size`.
    batch_size: rows per batch.
    rows: <int>[n], increasing: the requested rows.
  """

  def __init__(self, start: Callable[[int], grain.DatasetIterator], count: int, batch_size: int, rows: np.ndarray):
    super().__init__()
    reader, row = np.divmod(rows, batch_size // count)
    self._rows = {str(r): row[reader == r] for r in np.unique(reader)}
    self._readers = {name: start(int(name)) for name in self._rows}

  def __next__(self):
    parts = [{field: x[self._rows[name]] for field, x in next(reader).items()}
             for name, reader in self._readers.items()]
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}

  def get_state(self):
    return {name: reader.get_state() for name, reader in self._readers.items()}

  def set_state(self, state):
    for name, reader in self._readers.items():
      reader.set_state(state[name])
