"""Grouped matmul: consecutive groups of rows, each times a matrix of its own.

Gradients are written here, once, for all implementations: a kernel never sees JAX's differentiation.
"""
import functools

import jax
import jax.numpy as jnp

from moejax.kernels import padding
from moejax.kernels.choice import Name, choose
from moejax.kernels.implementation import Shape


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *,
                   implementation: Name | None = None) -> jax.Array:
  """Multiplies the first `group_sizes[0]` rows of `x` with `w[0]`, the next `group_sizes[1]` with `w[1]`, and so on.

  Rows after the last group may hold anything, NaN included: their outputs and gradients are zero, and they touch no
  other gradient. The matrix of an empty group gets a zero gradient. Sums are float32, whatever the inputs are.

  Args:
    x: <float>[M,D].
    w: <float>[E,D,F], of the dtype of `x`.
    group_sizes: <int32>[E], together at most M.
    implementation: see `choice.REASONS`; None picks by platform and shape (`explain` says which and why).

  Returns:
    <float>[M,F] of the dtype of `x`.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an implementation that is unknown or cannot run them here.
  """
  if x.ndim != 2 or w.ndim != 3 or group_sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
    raise ValueError('grouped_matmul needs x [M,D], w [E,D,F] and group_sizes [E], not '
                     f'{x.shape}, {w.shape} and {group_sizes.shape}.')
  if x.dtype != w.dtype or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError('grouped_matmul needs x and w of one dtype and whole group_sizes, not '
                     f'{x.dtype}, {w.dtype} and {group_sizes.dtype}.')
  chosen = choose(implementation, Shape(x.shape[0], w.shape[0], w.shape[1], w.shape[2], x.dtype))
  if x.shape[0] == 0:
    return jnp.zeros((0, w.shape[2]), x.dtype)
  return _grouped_matmul(chosen, x, w, group_sizes.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(implementation, x, w, group_sizes):
  return _matmul(implementation, x, w, group_sizes, transpose=False)


def _forward(implementation, x, w, group_sizes):
  return _grouped_matmul(implementation, x, w, group_sizes), (x, w, group_sizes)


def _backward(implementation, residuals, dy):
  x, w, group_sizes = residuals
  dx = _matmul(implementation, dy, w, group_sizes, transpose=True)
  padded_sizes, source, _ = _layout(implementation, group_sizes, x.shape[0])
  dw = implementation.weight_gradient(_read(x, source), _read(dy, source), padded_sizes)
  return dx, dw.astype(w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _matmul(implementation, x, w, group_sizes, transpose):
  padded_sizes, source, place = _layout(implementation, group_sizes, x.shape[0])
  return _read(implementation.matmul(_read(x, source), w, padded_sizes, transpose=transpose), place).astype(x.dtype)


def _layout(implementation, group_sizes, num_rows):
  # Group sizes as the kernel wants them, the row that each of its rows holds, and its inverse; None: rows as they are.
  if implementation.row_multiple == 1:
    return group_sizes, None, None
  return padding.pad_groups(group_sizes, num_rows, implementation.row_multiple)


def _read(x, row):
  return x if row is None else x.at[row].get(mode='fill', fill_value=0)
