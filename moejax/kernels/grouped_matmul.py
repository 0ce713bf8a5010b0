"""Grouped matmul: consecutive groups of rows, each times a matrix of its own.

An implementation is two functions, the ones that a forward and a backward pass are made of:

    matmul(x [M,D], w [E,D,F], group_sizes [E], transpose=False) -> [M,F]    (transpose: x [M,F] -> [M,D])
    weight_gradient(x [M,D], dy [M,F], group_sizes [E]) -> <float32>[E,D,F]

Gradients are written here, once, for all of them: a kernel never sees JAX's differentiation.
"""
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from moejax.kernels import ragged_dot
from moejax.kernels import reference
from moejax.kernels import xla

Name = Literal['reference', 'xla', 'ragged_dot']


class Implementation(NamedTuple):
  """One way to compute a grouped matmul; both functions as in the module's docstring."""
  matmul: Callable[..., jax.Array]
  weight_gradient: Callable[..., jax.Array]


IMPLEMENTATIONS: dict[str, Implementation] = {
    'reference': Implementation(reference.matmul, reference.weight_gradient),
    'xla': Implementation(xla.matmul, xla.weight_gradient),
    'ragged_dot': Implementation(ragged_dot.matmul, ragged_dot.weight_gradient),
}
assert set(IMPLEMENTATIONS) == set(get_args(Name))


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *,
                   implementation: Name | None = None) -> jax.Array:
  """Multiplies the first `group_sizes[0]` rows of `x` with `w[0]`, the next `group_sizes[1]` with `w[1]`, and so on.

  Rows after the last group may hold anything, NaN included: their outputs and gradients are zero, and they touch no
  other gradient. The matrix of an empty group gets a zero gradient. Sums are float32, whatever the inputs are.

  Args:
    x: <float>[M,D].
    w: <float>[E,D,F], of the dtype of `x`.
    group_sizes: <int32>[E], together at most M.
    implementation: 'reference' (every row times every matrix, masked), 'xla' (blocks of rows of one group in a loop),
      'ragged_dot' (`jax.lax.ragged_dot`, which on CPU computes every row times every matrix); None picks by platform.

  Returns:
    <float>[M,F] of the dtype of `x`.

  Raises:
    ValueError: an unknown implementation, or shapes or dtypes that do not fit.
  """
  name = implementation or default_implementation()
  if name not in IMPLEMENTATIONS:
    raise ValueError(f'grouped_matmul has no implementation {name!r}; there are {", ".join(sorted(IMPLEMENTATIONS))}.')
  if x.ndim != 2 or w.ndim != 3 or group_sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
    raise ValueError('grouped_matmul needs x [M,D], w [E,D,F] and group_sizes [E], not '
                     f'{x.shape}, {w.shape} and {group_sizes.shape}.')
  if x.dtype != w.dtype or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError('grouped_matmul needs x and w of one dtype and whole group_sizes, not '
                     f'{x.dtype}, {w.dtype} and {group_sizes.dtype}.')
  if x.shape[0] == 0:
    return jnp.zeros((0, w.shape[2]), x.dtype)
  return _grouped_matmul(name, x, w, group_sizes.astype(jnp.int32))


def default_implementation() -> Name:
  """The fastest implementation on this platform."""
  return 'xla' if jax.default_backend() == 'cpu' else 'ragged_dot'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(name, x, w, group_sizes):
  return IMPLEMENTATIONS[name].matmul(x, w, group_sizes).astype(x.dtype)


def _forward(name, x, w, group_sizes):
  return _grouped_matmul(name, x, w, group_sizes), (x, w, group_sizes)


def _backward(name, residuals, dy):
  x, w, group_sizes = residuals
  dx = IMPLEMENTATIONS[name].matmul(dy, w, group_sizes, transpose=True)
  dw = IMPLEMENTATIONS[name].weight_gradient(x, dy, group_sizes)
  return dx.astype(x.dtype), dw.astype(w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)
