"""The order of training: an endless stream over the examples, reshuffled every epoch, with random access.

The position is the whole state, and no permutation is stored, however many examples there are.
"""
import dataclasses
import functools
import math

import numpy as np

_ROUNDS = 8
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Order:
  """Maps positions of the stream to indices of examples.

  Positions `e * length` to `(e + 1) * length - 1` are epoch `e`, which holds every example once.
  """
  length: int
  seed: int

  def __call__(self, positions: np.ndarray) -> np.ndarray:
    """<int64>[n] indices below `length`, of <int64>[n] positions of any epochs."""
    positions = np.asarray(positions, np.int64)
    epochs, places = np.divmod(positions, self.length)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      indices[chosen] = permute(places[chosen], self.length, epoch_keys(self.seed, int(epoch)))
    return indices

  def at(self, position: int) -> int:
    """The index at one position; its neighbours are computed along with it and cached."""
    block, place = divmod(position, _BLOCK)
    return int(_indices(self, block)[place])


@functools.lru_cache(maxsize=8)
def _indices(order, block):
  return order(np.arange(block * _BLOCK, (block + 1) * _BLOCK))


@functools.lru_cache(maxsize=8)
def epoch_keys(seed: int, epoch: int) -> tuple[int, ...]:
  """One key per round."""
  return tuple(int(key) for key in np.random.SeedSequence([seed % 2**64, epoch]).generate_state(_ROUNDS, np.uint64))


def permute(places: np.ndarray, length: int, keys: tuple[int, ...]) -> np.ndarray:
  """The images of `places` under a permutation of `0..length-1` chosen by `keys`, without storing it.

  A Feistel network permutes the cells of a table that is as square as possible; cells past `length` (less than one row)
  are permuted again until they fall inside, which keeps it a permutation (Black and Rogaway 2002, "Ciphers with
  Arbitrary Finite Domains": generalized Feistel cipher and cycle walking).
  """
  columns = math.isqrt(length - 1) + 1
  rows = -(-length // columns)
  cells = _feistel(np.asarray(places, np.uint64), np.uint64(rows), np.uint64(columns), keys)
  outside = np.flatnonzero(cells >= length)
  while outside.size:
    cells[outside] = _feistel(cells[outside], np.uint64(rows), np.uint64(columns), keys)
    outside = outside[cells[outside] >= length]
  return cells.astype(np.int64)


def _feistel(cells, rows, columns, keys):
  row, column = cells // columns, cells % columns
  for down, across in zip(keys[::2], keys[1::2]):
    row = (row + _mix(column ^ np.uint64(down)) % rows) % rows
    column = (column + _mix(row ^ np.uint64(across)) % columns) % columns
  return row * columns + column


def _mix(x):
  """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits in which every bit counts."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
