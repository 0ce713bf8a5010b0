"""Grouped matmul by `jax.lax.ragged_dot_general`. Native on TPU; elsewhere XLA may expand it to a dense product."""
import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose: bool = False) -> jax.Array:
  """x: <float>[M,D], w: <float>[E,D,F] -> <float32>[M,F]; transposed, x: <float>[M,F] -> <float32>[M,D]."""
  dimensions = jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
      lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
  y = jax.lax.ragged_dot_general(_in_groups(x, group_sizes), w, group_sizes, dimensions,
                                 preferred_element_type=jnp.float32)
  # Backends disagree on what they leave in the rows after the last group.
  return _in_groups(y, group_sizes)


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """x: <float>[M,D], dy: <float>[M,F] -> <float32>[E,D,F]."""
  dimensions = jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
  dw = jax.lax.ragged_dot_general(_in_groups(x, group_sizes), _in_groups(dy, group_sizes), group_sizes, dimensions,
                                  preferred_element_type=jnp.float32)
  return jnp.where((group_sizes > 0)[:, None, None], dw, 0.)


def _in_groups(x, group_sizes):
  return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], x, 0)
