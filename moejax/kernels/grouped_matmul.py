"""Grouped matmul: consecutive groups of rows, each times its own matrix.

Gradients are defined here once for all implementations; kernels are never differentiated by JAX.
"""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels import padding
from moejax.kernels.choice import Name, Shape, choose


def grouped_matmul(x: Float[Array, 'M D'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'], *,
                   implementation: Name | None = None) -> Float[Array, 'M F']:
  """Multiplies the first `group_sizes[0]` rows of `x` with `w[0]`, the next `group_sizes[1]` with `w[1]`, and so on.

  Rows after the last group may hold anything, including NaN: their outputs and gradients are zero, and they do not
  affect other gradients. The matrix of an empty group gets a zero gradient. Sums are float32 for any input dtype.

  Args:
    x: <float>[M,D].
    w: <float>[E,D,F], of the dtype of `x`.
    group_sizes: <int32>[E], together at most M.
    implementation: see `choice.REASONS`; None: by platform and shape (see `explain`).

  Returns:
    <float>[M,F] of the dtype of `x`.

  Raises:
    ValueError: shapes or dtypes do not match, or the implementation is unknown or cannot run them here.
  """
  if x.ndim != 2 or w.ndim != 3 or group_sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
    raise ValueError('grouped_matmul needs x [M,D], w [E,D,F] and group_sizes [E], not '
                     f'{x.shape}, {w.shape} and {group_sizes.shape}.')
  if x.dtype != w.dtype or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError('grouped_matmul needs x and w of the same dtype and integer group_sizes, not '
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
  # Padded group sizes for the kernel, the source row of each padded row, and its inverse; None: no padding.
  if implementation.row_multiple == 1:
    return group_sizes, None, None
  return padding.pad_groups(group_sizes, num_rows, implementation.row_multiple)


def _read(x, row):
  return x if row is None else x.at[row].get(mode='fill', fill_value=0)
