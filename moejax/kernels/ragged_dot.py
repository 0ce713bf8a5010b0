"""Grouped matmul by `jax.lax.ragged_dot_general`. Native on TPU; elsewhere XLA may expand it to a dense product."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.kernels.choice import Implementation


def by_ragged_dot(ragged_dot_general: Callable[..., jax.Array], **limit) -> Implementation:
  """An implementation from a function like `jax.lax.ragged_dot_general`; `dtype` is the result's."""
  def matmul(x, w, group_sizes, transpose=False):
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
        lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
    y = ragged_dot_general(_in_groups(x, group_sizes), w, group_sizes, dimensions, dtype=x.dtype)
    # Backends differ in the contents of rows after the last group.
    return _in_groups(y, group_sizes)

  def weight_gradient(x, dy, group_sizes):
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    dw = ragged_dot_general(_in_groups(x, group_sizes), _in_groups(dy, group_sizes), group_sizes, dimensions,
                            dtype=jnp.float32)
    return jnp.where((group_sizes > 0)[:, None, None], dw, 0.)

  return Implementation(matmul, weight_gradient, **limit)


def full_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
  """The precision without which GPUs round float32 to TF32 and TPUs to bfloat16."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _in_groups(x, group_sizes):
  return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], x, 0)


def _ragged_dot(a, b, group_sizes, dimensions, dtype):
  y = jax.lax.ragged_dot_general(a, b, group_sizes, dimensions, precision=full_precision(a.dtype),
                                 preferred_element_type=jnp.float32)
  return y.astype(dtype)


IMPLEMENTATION = by_ragged_dot(_ragged_dot)
