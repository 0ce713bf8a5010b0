"""What a rule does to the arrays of a source: operations on numpy arrays, by name, and the shapes that they accept."""
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

Do = Literal['copy', 'repeat', 'stack', 'mean', 'resize', 'resize_grid', 'reinitialise']
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
  """One value of `do`.

  Attributes:
    said: what it does, in the past tense.
    fits: `(our shape, shape in each source, number of sources) -> bool`.
    compute: `(arrays, one of each source; our shape) -> array` of our shape; may be a view.
    several: whether it reads several sources; all others read one.
  """
  said: str
  fits: Callable[[Shape, Shape, int], bool]
  compute: Callable[[Sequence[np.ndarray], Shape], np.ndarray]
  several: bool = False


def resize(table: np.ndarray, length: int) -> np.ndarray:
  """table: <float>[L,...] -> <float>[length,...]: linear interpolation along the first axis; the ends stay the ends."""
  return np.tensordot(_weights(len(table), length), table, axes=1)


def resize_grid(table: np.ndarray, length: int) -> np.ndarray:
  """The rows of a square grid, row-major, after the class token if there is one: bilinear interpolation.

  The corners stay the corners (as in the code of ViT, 2010.11929), and the class token is copied.

  table: <float>[L,...] -> <float>[length,...], for lengths of which `grids` is true.
  """
  old, new = _sides(len(table)), _sides(length)
  prefix = min(old.keys() & new.keys())
  grid = table[prefix:].reshape(old[prefix], old[prefix], -1)
  weights = _weights(old[prefix], new[prefix])
  resized = np.einsum('yr,xc,rcf->yxf', weights, weights, grid, optimize=True)
  return np.concatenate([table[:prefix], resized.reshape(-1, *table.shape[1:])])


def grids(old: int, new: int) -> bool:
  """Whether both lengths are squares, or both are a square and a class token."""
  return bool(_sides(old).keys() & _sides(new).keys())


def _sides(length: int) -> dict[int, int]:
  """{number of class tokens: side of the square grid of the others}."""
  return {prefix: math.isqrt(length - prefix) for prefix in (0, 1)
          if length > prefix and math.isqrt(length - prefix)**2 == length - prefix}


def _weights(old: int, new: int) -> np.ndarray:
  """<float64>[new,old]: rows that sum to one."""
  at = np.linspace(0, old - 1, new)
  low = np.minimum(at.astype(int), max(old - 2, 0))
  weights = np.zeros((new, old))
  weights[np.arange(new), low] = 1 - (at - low)
  if old > 1:
    weights[np.arange(new), low + 1] = at - low
  return weights


def _same(ours: Shape, source: Shape, count: int) -> bool:
  return ours == source


def _leading_axis(ours: Shape, source: Shape, count: int) -> bool:
  return ours[1:] == source and len(ours) == len(source) + 1


def _other_length(ours: Shape, source: Shape, count: int) -> bool:
  return ours[1:] == source[1:] and len(ours) == len(source) > 0


OPERATIONS: dict[str, Operation] = {
    'copy': Operation('copied', _same, lambda arrays, shape: arrays[0]),
    'repeat': Operation('repeated to experts', _leading_axis, lambda arrays, shape: np.broadcast_to(arrays[0], shape)),
    'stack': Operation('stacked to experts', lambda *shapes: _leading_axis(*shapes) and shapes[0][0] == shapes[2],
                       lambda arrays, shape: np.stack(arrays), several=True),
    'mean': Operation('averaged', _same, lambda arrays, shape: np.asarray(np.mean(arrays, axis=0, dtype=np.float64)),
                      several=True),
    'resize': Operation('resized', _other_length, lambda arrays, shape: resize(arrays[0], shape[0])),
    'resize_grid': Operation(
        'resized as grids', lambda *shapes: _other_length(*shapes) and grids(shapes[1][0], shapes[0][0]),
        lambda arrays, shape: resize_grid(arrays[0], shape[0])),
}
REINITIALISE = 'reinitialise'
assert {*OPERATIONS, REINITIALISE} == set(get_args(Do))
