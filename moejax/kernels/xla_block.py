"""The fused expert block in plain JAX: for each expert, a loop over blocks of its rows that stay in the cache.

A block of rows is gathered, multiplied, activated, multiplied again and added to its tokens; nothing else of the size
of all rows is written. Surplus rows of a block are padding: they read zeros, and their outputs are dropped. The
pre-activations are saved for the backward pass in row order: blocks are written in order, so the next block overwrites
surplus rows. Recomputing them instead would save memory, but took 10 % longer with 64 experts.

Tried, but not faster: two interleaved chains of experts, serialised products, gradients in uninitialised memory, the
sum of a row's products as a matrix product.
"""
import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.activations import Activation, activate
from moejax.kernels.implementation import BlockKernels, Implementation
from moejax.kernels.routes import NOWHERE, Routes, Weights, take
from moejax.kernels.xla import block_sizes, dot, matmul, over_blocks, starts, weight_gradient


def forward(x: jax.Array, weights: Weights, routes: Routes, activation: Activation,
            save: bool) -> tuple[jax.Array, tuple | None]:
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


def backward(x: jax.Array, weights: Weights, routes: Routes, activation: Activation, saved: tuple,
             dy: jax.Array) -> tuple[jax.Array, Weights, jax.Array]:
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


IMPLEMENTATION = Implementation(matmul, weight_gradient, block=BlockKernels(forward, backward))
