"""Grouped matmul in plain JAX: for each matrix, a loop over blocks of its own rows.

Rows are multiplied only with their own matrix, and nothing of size M is copied or padded: blocks are slices of `x`
aligned to the start of a group, and their number is determined at run time. Made for CPUs.
"""
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar('Carry')


def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose: bool = False) -> jax.Array:
  """x: <float>[M,D], w: <float>[E,D,F] -> <float>[M,F]; transposed, x: <float>[M,F] -> <float>[M,D]."""
  def group(y, group):
    matrix, start, size = group

    def block(y, first, end, rows, fresh):
      at, mine = _within(first, rows, end, x.shape[0])
      product = dot(_read(x, at, mine), matrix, (1, 1 if transpose else 0)).astype(x.dtype)
      return lax.dynamic_update_slice_in_dim(y, jnp.where(mine, product, _read(y, at, mine)), at, axis=0)

    return over_blocks(block, y, start, size, sizes), None

  sizes = block_sizes(x.shape[0], w.shape[0])
  y = jnp.zeros((x.shape[0], w.shape[1 if transpose else 2]), x.dtype)
  return lax.scan(group, y, (w, starts(group_sizes), group_sizes))[0]


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """x: <float>[M,D], dy: <float>[M,F] -> <float32>[E,D,F]."""
  def group(_, group):
    start, size = group

    def block(dw, first, end, rows, fresh):
      at, mine = _within(first, rows, end, x.shape[0])
      # Both sides are masked: 0 * NaN in another group's row would be NaN.
      part = dot(jnp.where(mine, _read(x, at, mine), 0), jnp.where(mine, _read(dy, at, mine), 0), (0, 0))
      return part if fresh else dw + part

    dw = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
    return None, over_blocks(block, dw, start, size, sizes)

  sizes = block_sizes(x.shape[0], group_sizes.shape[0])
  return lax.scan(group, None, (starts(group_sizes), group_sizes))[1]


def over_blocks(body: Callable[[Carry, jax.Array, jax.Array, int, bool], Carry], carry: Carry, start: jax.Array,
                size: jax.Array, sizes: tuple[int, ...]) -> Carry:
  """`body(carry, first, end, rows, fresh)` for blocks that cover the rows start .. start+size, in order.

  The first block holds the remainder, the others are full. `rows` is static, so there is one loop per size, which runs
  once or not at all. (A conditional would copy what it updates; a loop does not.) Rows from `end` on belong to the next
  group. `fresh`: whether it is the first block, which initialises sums. `sizes`: see `block_sizes`.
  """
  whole = jnp.maximum(size - 1, 0) // sizes[-1]
  rest = size - whole * sizes[-1]
  for smaller, rows in zip((0, *sizes), sizes):
    once = ((rest > smaller) & (rest <= rows)).astype(jnp.int32)
    # `n` is 0; without it the body is loop-invariant, and the compiler would hoist it out of a loop that may not run.
    carry = lax.fori_loop(0, once, lambda n, carry, rows=rows: body(carry, start + n, start + rest, rows, True), carry)
  block = lambda n, carry: body(carry, start + rest + n * sizes[-1], start + size, sizes[-1], False)
  return lax.fori_loop(0, whole, block, carry)


def block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
  """Rows per block: the possible sizes of a group's first block; the last is the size of all its other blocks.

  A matrix is repacked for each block it multiplies, so one block should hold a whole group: with untrained routers,
  group sizes differ by a fifth of the mean. A block of more than 400 rows leaves the cache; one of fewer than 64 spends
  most of its time packing. Surplus rows of a block are wasted work, so sizes are closely spaced; but each must be
  compiled.
  """
  largest = 8 * math.ceil(min(400, max(64, 1.5 * num_rows / num_groups)) / 8)
  step = max(16, 8 * round(largest / 12 / 8))
  return tuple(sorted({min(rows, num_rows) for rows in range(largest, largest // 3, -step)}))


def starts(group_sizes: jax.Array) -> jax.Array:
  """<int32>[E]: the first row of each group."""
  return jnp.cumsum(group_sizes) - group_sizes


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """The product over one axis of each, in float32."""
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _within(first, rows, end, num_rows):
  # The start of the block, moved back to fit the array, and a mask of its rows that are the group's and not yet
  # computed.
  at = jnp.minimum(first, num_rows - rows)
  row = at + jnp.arange(rows)
  return at, ((row >= first) & (row < end))[:, None]


def _read(x, at, mine):
  return lax.dynamic_slice_in_dim(x, at, mine.shape[0], axis=0)
