"""Packs documents of any length into rows of one length, with segments and positions.

    segments   1, 2, ... for the documents of a row, 0 for padding
    positions  0, 1, ... within the part of a document that the row holds

Rows are made in windows of some batches and shuffled within the window, since neighbouring rows come from the same
documents. The state is only the start of the window, so it is small; restoring it packs one window again.
"""
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from moejax.data.source import DataError

# Without a limit, an endless stream of empty documents would give neither a batch nor an error.
_PATIENCE = 10_000


class Document:
  """A document in lazily made parts: memory does not grow with its length.

  Args:
    parts: makes all parts, each with its size in units of `offset`. The first is made at once, in the thread that reads
      ahead; going back makes them again.
  """

  def __init__(self, parts: Callable[[], Iterator[tuple[int, Any]]]):
    self._make = parts
    self._restart()

  def find(self, offset: int) -> tuple[Any, int] | None:
    """The part that holds `offset`, and where the part begins; None past the end."""
    if offset < self._begin:
      self._restart()
    while self._part is not None and offset >= self._begin + self._size:
      self._begin += self._size
      self._advance()
    return None if self._part is None else (self._part, self._begin)

  def _restart(self):
    self._parts, self._begin = self._make(), 0
    self._advance()

  def _advance(self):
    self._size, self._part = next(self._parts, (0, None))


class Window(Protocol):
  """Rows being filled."""

  def add(self, document: Document, offset: int) -> int | None:
    """Adds the document from `offset` on; returns the offset of the rest that did not fit, None if all of it did."""

  def rows(self) -> dict[str, np.ndarray]:
    """The filled rows, [rows, length] each, without empty rows; {} if all are empty."""
    ...


class ConcatWindow:
  """Concatenated documents, cut where a row ends. Only the very end is padded.

  Parts of documents are `{name: <int32>[n]}`; `offset` counts tokens.
  """

  def __init__(self, num_rows: int, length: int, names: tuple[str, ...]):
    self._length = length
    self._values = {name: np.zeros(num_rows * length, np.int32) for name in (*names, 'document', 'position')}
    self._filled = self._documents = 0

  def add(self, document, offset):
    number = self._documents + 1
    while found := document.find(offset):
      part, begin = found
      room = self._values['document'].size - self._filled
      if not room:
        return offset
      taken = {name: value[offset - begin:offset - begin + room] for name, value in part.items()}
      size = len(next(iter(taken.values())))
      here = slice(self._filled, self._filled + size)
      for name, value in {**taken, 'document': number, 'position': np.arange(offset, offset + size)}.items():
        self._values[name][here] = value
      self._documents = number
      self._filled += size
      offset += size
    return None

  def rows(self):
    if not self._filled:
      return {}
    used = -(-self._filled // self._length)
    values = {name: value.reshape(-1, self._length)[:used] for name, value in self._values.items()}
    document, position = values.pop('document'), values.pop('position')
    segments = np.where(document > 0, document - document[:, :1] + 1, 0)
    # A document that began in an earlier row starts at 0 here, since the row does not see its beginning.
    positions = position - np.where(segments == 1, position[:, :1], 0)
    return {**values, 'segments': segments, 'positions': positions}


class FirstFitWindow:
  """Whole pieces, each in the first row with room for it on every side (encoder and decoder, say).

  Parts of documents are lists of pieces `{side: {name: <int32>[n]}}`; `offset` counts pieces. Every piece fits an empty
  row.
  """

  def __init__(self, num_rows: int, lengths: Mapping[str, int]):
    self._lengths = dict(lengths)
    self._free = np.tile(list(self._lengths.values()), (num_rows, 1))
    self._pieces = np.zeros(num_rows, np.int32)
    self._values = {}

  def add(self, document, offset):
    while found := document.find(offset):
      pieces, begin = found
      if not self._place(pieces[offset - begin]):
        return offset
      offset += 1
    return None

  def _place(self, piece) -> bool:
    """Whether there was room."""
    needed = [len(next(iter(piece[side].values()))) for side in self._lengths]
    room: np.ndarray = np.all(self._free >= needed, axis=-1)
    row = int(room.argmax())
    if not room[row]:
      return False
    self._pieces[row] += 1
    for column, (side, length) in enumerate(self._lengths.items()):
      start = length - self._free[row, column]
      extra = {f'{side}_segments': self._pieces[row], f'{side}_positions': np.arange(needed[column])}
      for name, value in {**piece[side], **extra}.items():
        self._array(name, length)[row, start:start + needed[column]] = value
    self._free[row] -= needed
    return True

  def rows(self):
    return {name: value[:np.count_nonzero(self._pieces)] for name, value in self._values.items()}

  def _array(self, name, length):
    if name not in self._values:
      self._values[name] = np.zeros((len(self._free), length), np.int32)
    return self._values[name]


class Packing(grain.IterDataset):
  """Batches of `batch_size` packed rows.

  Args:
    documents: `Document`s of the parts that the windows take.
    window: makes an empty window of the given number of rows.
    batch_size: rows per batch; the last batch of a finite data set is padded with empty rows.
    batches: batches per window.
    seed: shuffles the rows of a window; None leaves them in order.
  """

  def __init__(self, documents: grain.IterDataset, window: Callable[[int], Window], batch_size: int, batches: int,
               seed: tuple[int, ...] | None):
    super().__init__(documents)
    self._arguments = (window, batch_size, batches, seed)

  def __iter__(self):
    return _PackingIterator(iter(self._parent), *self._arguments)


class _PackingIterator(grain.DatasetIterator):

  def __init__(self, documents, window, batch_size, batches, seed):
    super().__init__(documents)
    self._window, self._batch_size, self._batches, self._seed = window, batch_size, batches, seed
    self._restart(documents.get_state(), offset=0, index=0)

  def _restart(self, documents, offset, index):
    self._begin = (documents, offset)  # of the current window
    self._offset = offset  # of the next document
    self._held = None  # (state before it, document): it did not fit the current window
    self._index, self._taken, self._rows = index, 0, None

  def __next__(self):
    if self._rows is None:
      self._fill()
    elif self._taken * self._batch_size >= self._count():
      self._index, self._taken = self._index + 1, 0
      self._fill()
    if not self._count():
      raise StopIteration
    start = self._taken * self._batch_size
    self._taken += 1
    return {name: _padded(value[start:start + self._batch_size], self._batch_size)
            for name, value in (self._rows or {}).items()}

  def get_state(self):
    documents, offset = self._begin
    return {'documents': documents, 'offset': offset, 'window': self._index, 'taken': self._taken}

  def set_state(self, state):
    self._parent.set_state(state['documents'])
    self._restart(state['documents'], state['offset'], state['window'])
    if state['taken']:
      self._fill()
      self._taken = state['taken']

  def _count(self):
    return len(next(iter((self._rows or {}).values()), ()))

  def _fill(self):
    window = self._window(self._batch_size * self._batches)
    self._begin = (self._held[0] if self._held else self._parent.get_state(), self._offset)
    for read in itertools.count(1):
      state, document = self._held or (self._parent.get_state(), next(self._parent, None))
      self._held = None
      if document is None:
        break
      rest = window.add(document, self._offset)
      self._offset = rest or 0
      if rest is not None:
        self._held = (state, document)
        break
      if read == _PATIENCE and not window.rows():
        raise DataError(f'{_PATIENCE} consecutive documents were empty or too short to pack.')
    self._rows = window.rows()
    if self._seed is not None:
      order = np.random.default_rng((*self._seed, self._index)).permutation(self._count())
      self._rows = {name: value[order] for name, value in self._rows.items()}


def _padded(rows, size):
  return rows if len(rows) == size else np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), rows.dtype)])
