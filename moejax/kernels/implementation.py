"""The interface of implementations of grouped matmuls."""
from collections.abc import Callable
from typing import NamedTuple

import jax

from moejax.kernels.target import Target


class Shape(NamedTuple):
  """A grouped matmul: `rows` of width `inner`, in `groups` with a matrix [inner, outer] each."""
  rows: int
  groups: int
  inner: int
  outer: int
  dtype: jax.typing.DTypeLike


class BlockKernels(NamedTuple):
  """A fused expert block; arguments and results as in `xla_block`."""
  forward: Callable[..., tuple]
  backward: Callable[..., tuple]


class Implementation(NamedTuple):
  """One way to compute a grouped matmul, forward and backward.

  Attributes:
    matmul: `(x [M,D], w [E,D,F], group_sizes [E], transpose=False) -> [M,F]`; transposed, `x [M,F] -> [M,D]`.
    weight_gradient: `(x [M,D], dy [M,F], group_sizes [E]) -> <float32>[E,D,F]`.
    limit: one sentence on why the target cannot run the shape, or None if it can.
    row_multiple: group sizes must be positive multiples of this (see `padding`); 1: any size.
    up: `(x, wi, wg | None, group_sizes, activation) -> (hidden [M,F], zi [M,F], zg [M,F] | None)`: an expert's first
      matmul and its activation in one pass; None: composed of `matmul` and XLA.
    block: the whole expert block fused; None: composed of the others.
  """
  matmul: Callable[..., jax.Array]
  weight_gradient: Callable[..., jax.Array]
  limit: Callable[[Target, Shape], str | None] = lambda target, shape: None
  row_multiple: int = 1
  up: Callable[..., tuple] | None = None
  block: BlockKernels | None = None
