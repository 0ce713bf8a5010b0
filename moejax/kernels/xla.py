"""Kernels in plain JAX: for each expert, a loop over blocks of its own rows that stay in the cache. Made for CPUs.

Rows are multiplied only with the matrix of their expert, and nothing of size M is padded: blocks begin at the start of
a group, and their number is determined at run time.

The fused block gathers a block of rows, multiplies, activates and multiplies it again, and adds it to its tokens;
nothing else of the size of all rows is written. Surplus rows of a block are padding: they read zeros, and their outputs
are dropped. The pre-activations are saved for the backward pass in row order: blocks are written in order, so the next
block overwrites surplus rows. Recomputing them instead would save memory, but took 10 % longer with 64 experts.

Tried, but not faster: two interleaved chains of experts, serialised products, gradients in uninitialised memory, the
sum of a row's products as a matrix product.
"""
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from moejax.kernels.choice import BlockKernels, Implementation
from moejax.kernels.expert_block import Activation, activate
from moejax.kernels.routes import NOWHERE, Routes, Weights, take

Carry = TypeVar('Carry')


def forward(x: Float[Array, 'N D'], weights: Weights, routes: Routes, activation: Activation,
            save: bool) -> tuple[Float32[Array, 'N D'], tuple | None]:
  """x: <float>[N,D] -> <float32>[N,D], and residuals for `backward` if `save`. Other arguments as in `expert_block`."""
  read = _Reader(routes)

  def expert(carry, group):
    own, start, size = group

    def block(carry, first, end, rows, fresh):
      y, saved = carry
      _, token, share = read(first, end, rows)
      z = _pre_activations(own, take(x, token))
      out = dot(activate(activation, *z).astype(x.dtype), own.wo, (1, 0))
      out = out if own.bo is None else out + own.bo
      keep = lambda all_z, z: lax.dynamic_update_slice_in_dim(all_z, z.astype(x.dtype), first, axis=0)
      return _add(y, token, out * share), saved and jax.tree.map(keep, saved, z)

    return over_blocks(block, carry, start, size, read.sizes), None

  saved = tuple(None if w is None else jnp.zeros((read.num_rows, w.shape[2]), x.dtype)
                for w in (weights.wi, weights.wg)) if save else None
  groups = weights, starts(routes.group_sizes), routes.group_sizes
  return lax.scan(expert, (jnp.zeros(x.shape, jnp.float32), saved), groups)[0]


def backward(x: Float[Array, 'N D'], weights: Weights, routes: Routes, activation: Activation, saved: tuple,
             dy: Float[Array, 'N D']) -> tuple[Float32[Array, 'N D'], Weights, Float32[Array, 'M']]:
  """The gradients of `x` <float32>[N,D], of the weights in float32, and of `routes.weight` <float32>[M]."""
  read = _Reader(routes)
  dy = dy.astype(x.dtype)

  def expert(carry, group):
    own, e, start, size = group

    def block(carry, first, end, rows, fresh):
      dx, dweight, grads = carry
      mine, token, share = read(first, end, rows)
      row, d = take(x, token), take(dy, token)
      z = jax.tree.map(lambda z: lax.dynamic_slice_in_dim(z, first, rows).astype(jnp.float32), saved)
      hidden, pull = jax.vjp(lambda *z: activate(activation, *z), *z)
      dhidden = dot(d, own.wo, (1, 1))
      # Masked, not weighted by zero: in the next expert's rows, 0 * NaN would be NaN.
      hidden, dzi, dzg = jax.tree.map(lambda a: jnp.where(mine, a, 0), (hidden, *pull(dhidden * share)))
      dshare = (dhidden * hidden).sum(1)
      d = d.astype(jnp.float32)
      if own.bo is not None:
        dshare = dshare + (d * own.bo).sum(1)
      d = d * share
      low = lambda a: a.astype(x.dtype)
      out = dot(low(dzi), own.wi, (1, 1))
      parts = dict(wi=dot(row, low(dzi), (0, 0)), wo=dot(low(hidden), low(d), (0, 0)), bi=dzi.sum(0), bo=d.sum(0))
      if own.wg is not None:
        out = out + dot(low(dzg), own.wg, (1, 1))
        parts |= dict(wg=dot(row, low(dzg), (0, 0)), bg=dzg.sum(0))

      def add(total, part):
        # Updated in place, without an addition for the first block: these are the largest arrays.
        part = part if fresh else part + lax.dynamic_index_in_dim(total, e, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, part, e, axis=0)
      grads = grads._replace(**{name: add(getattr(grads, name), part)
                                for name, part in parts.items() if getattr(own, name) is not None})
      return _add(dx, token, out), lax.dynamic_update_slice_in_dim(dweight, dshare, first, axis=0), grads

    return over_blocks(block, carry, start, size, read.sizes), None

  carry = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(read.num_rows, jnp.float32),
           jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
  groups = weights, jnp.arange(len(routes.group_sizes)), starts(routes.group_sizes), routes.group_sizes
  dx, dweight, grads = lax.scan(expert, carry, groups)[0]
  return dx, grads, dweight[:len(routes.token)]


class _Reader:
  """Reads the routes of a block; `sizes` of blocks, and `num_rows` padded by one block."""

  def __init__(self, routes):
    self.sizes = block_sizes(len(routes.token), len(routes.group_sizes))
    self._token, self._weight = (jnp.pad(a, (0, self.sizes[-1])) for a in (routes.token, routes.weight))
    self.num_rows = len(self._token)

  def __call__(self, first, end, rows):
    """Mask of the group's rows <bool>[rows,1], their tokens <int32>[rows] and weights <float32>[rows,1]."""
    mine = first + jnp.arange(rows) < end
    token, weight = (lax.dynamic_slice_in_dim(a, first, rows) for a in (self._token, self._weight))
    return mine[:, None], jnp.where(mine, token, NOWHERE), jnp.where(mine, weight, 0)[:, None]


def _add(total, token, rows):
  return total.at[token].add(rows, mode='drop')


def _pre_activations(own, rows):
  affine = lambda w, b: dot(rows, w, (1, 0)) + (0. if b is None else b)
  return affine(own.wi, own.bi), None if own.wg is None else affine(own.wg, own.bg)


def matmul(x: Float[Array, 'M inner'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'],
           transpose: bool = False) -> Float[Array, 'M outer']:
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


def weight_gradient(x: Float[Array, 'M D'], dy: Float[Array, 'M F'],
                    group_sizes: Int[Array, 'E']) -> Float32[Array, 'E D F']:
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


def over_blocks(body: Callable[[Carry, jax.Array, jax.Array, int, bool], Carry], carry: Carry, start: Int[Array, ''],
                size: Int[Array, ''], sizes: tuple[int, ...]) -> Carry:
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


def starts(group_sizes: Int[Array, 'E']) -> Int[Array, 'E']:
  """<int32>[E]: the first row of each group."""
  return jnp.cumsum(group_sizes) - group_sizes


def dot(a: Float[Array, 'rows columns'], b: Float[Array, 'other_rows other_columns'],
        contract: tuple[int, int]) -> Float32[Array, 'I O']:
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


IMPLEMENTATION = Implementation(matmul, weight_gradient, block=BlockKernels(forward, backward))
