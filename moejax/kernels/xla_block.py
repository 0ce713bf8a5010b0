"""The fused expert block in plain JAX: for each expert, a loop over blocks of its rows that stay in the cache.

A block of rows is read by index, multiplied, activated, multiplied again and written where its group's rows lie. Blocks
come in the order of their rows, so what one writes beyond its own rows is written again by the next, and what is written
beyond the last group is read by nobody. For the backward pass the pre-activations are kept; to compute them again would
keep less than half as much, and took 10 % longer with 64 experts.
"""
import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.activations import Activation, activate
from moejax.kernels.implementation import Block, Implementation
from moejax.kernels.routes import Routes, Weights, combine, take
from moejax.kernels.xla import block_sizes, dot, matmul, over_blocks, starts, weight_gradient


def forward(x: jax.Array, weights: Weights, routes: Routes, activation: Activation,
            save: bool) -> tuple[jax.Array, tuple | None]:
  """x: <float>[N,D] -> <float32>[N,D], and what `backward` needs if `save`. Other arguments as in `expert_block`."""
  num_rows, num_groups, token, _, slack = _sizes(routes)

  def expert(carry, group):
    own, start, size = group

    def block(carry, first, end, rows, fresh):
      y, saved = carry
      z = _pre_activations(own, take(x, lax.dynamic_slice_in_dim(token, first, rows)))
      out = dot(activate(activation, *z).astype(x.dtype), own.wo, (1, 0))
      out = out if own.bo is None else out + own.bo
      return write(y, out, first), saved and jax.tree.map(lambda all_z, z: write(all_z, z, first), saved, z)

    return over_blocks(block, carry, start, size, num_rows, num_groups), None

  def write(rows, block, first):
    return lax.dynamic_update_slice_in_dim(rows, block.astype(x.dtype), first, axis=0)

  def rows(width):
    return jnp.zeros((num_rows + slack, width), x.dtype)

  saved = tuple(None if w is None else rows(w.shape[2]) for w in (weights.wi, weights.wg)) if save else None
  groups = weights, starts(routes.group_sizes), routes.group_sizes
  y, saved = lax.scan(expert, (rows(x.shape[1]), saved), groups)[0]
  return combine(y, routes, routes.weight, x.shape[0]), saved


def backward(x: jax.Array, weights: Weights, routes: Routes, activation: Activation, saved: tuple,
             dy: jax.Array) -> tuple[jax.Array, Weights, jax.Array]:
  """The gradients of `x` <float32>[N,D], of the weights in float32, and of `routes.weight` <float32>[M]."""
  num_rows, num_groups, token, weight, slack = _sizes(routes)
  dy = dy.astype(x.dtype)

  def expert(carry, group):
    own, e, start, size = group

    def block(carry, first, end, rows, fresh):
      dx, dweight, grads = carry
      mine = (first + jnp.arange(rows) < end)[:, None]
      tokens = lax.dynamic_slice_in_dim(token, first, rows)
      # Both are selected, not weighted by zero: a foreign row's 0 * NaN would be NaN.
      row, d = jnp.where(mine, take(x, tokens), 0), jnp.where(mine, take(dy, tokens), 0)
      share = jnp.where(mine, lax.dynamic_slice_in_dim(weight, first, rows)[:, None], 0)
      z = jax.tree.map(lambda z: lax.dynamic_slice_in_dim(z, first, rows).astype(jnp.float32), saved)
      hidden, pull = jax.vjp(lambda *z: activate(activation, *z), *z)
      dhidden = dot(d, own.wo, (1, 1))
      dzi, dzg = pull(dhidden * share)
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
        # Written where it stays, and where it is the first not added: these are the largest arrays there are.
        part = part if fresh else part + lax.dynamic_index_in_dim(total, e, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, part, e, axis=0)
      grads = grads._replace(**{name: add(getattr(grads, name), part)
                                for name, part in parts.items() if getattr(own, name) is not None})
      dx = lax.dynamic_update_slice_in_dim(dx, out.astype(x.dtype), first, axis=0)
      return dx, lax.dynamic_update_slice_in_dim(dweight, dshare, first, axis=0), grads

    return over_blocks(block, carry, start, size, num_rows, num_groups), None

  carry = (jnp.zeros((num_rows + slack, x.shape[1]), x.dtype), jnp.zeros(num_rows + slack),
           jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
  groups = weights, jnp.arange(num_groups), starts(routes.group_sizes), routes.group_sizes
  dx, dweight, grads = lax.scan(expert, carry, groups)[0]
  return combine(dx, routes, None, x.shape[0]), grads, dweight[:num_rows]


def _sizes(routes):
  # Rows, groups, and what routes say of each row, with room for a last block that is larger than its rows.
  num_rows, num_groups = routes.token.shape[0], routes.group_sizes.shape[0]
  slack = block_sizes(num_rows, num_groups)[-1]
  return num_rows, num_groups, jnp.pad(routes.token, (0, slack)), jnp.pad(routes.weight, (0, slack)), slack


def _pre_activations(own, rows):
  def affine(w, b):
    return None if w is None else dot(rows, w, (1, 0)) + (0. if b is None else b)
  return affine(own.wi, own.bi), affine(own.wg, own.bg)


IMPLEMENTATION = Implementation(matmul, weight_gradient, block=Block(forward, backward))
