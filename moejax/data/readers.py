"""Readers: batches that are read in parts, so that nobody has to read rows that another one feeds."""
from collections.abc import Callable

import grain
import numpy as np


class Readers(grain.DatasetIterator):
  """Rows of batches of which each of `count` readers makes an equal part, one after the other.

  What a batch holds depends on the number of readers, and not on who asks for which of its rows. A reader that makes
  none of them is not started. The state is `{reader: its state}`: those of several processes together hold all readers,
  and any process can start from them.

  Args:
    start: (reader) -> iterator over its part of every batch.
    count: of readers; divides `batch_size`.
    batch_size: rows of a batch.
    rows: <int>[n], increasing: those wanted.
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
