"""Normalisation by sums that may be tiny or zero."""
import jax
import jax.numpy as jnp


def scaled(values: jax.Array) -> jax.Array:
  """`values` <float32>[..., K] divided by the power of two that brings the largest into [1, 2).

  Results that are invariant to a common factor stay bit-identical, and neither they nor their gradients underflow.
  """
  largest = jax.lax.stop_gradient(jnp.abs(values).max(-1, keepdims=True)).astype(jnp.float32)
  exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
  power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
  return values / jnp.where(power > 0, power, 1.)


def normalized(values: jax.Array) -> jax.Array:
  """`values` <float32>[..., K], non-negative, divided by their sum; zeros, with zero gradient, if the sum is zero."""
  values = scaled(values)
  total = values.sum(-1, keepdims=True)
  return values / jnp.where(total > 0, total, 1.)


def softmax_over(members: jax.Array, logits: jax.Array) -> jax.Array:
  """Softmax of `logits` <float32>[..., K] over `members` <bool>[..., K] only; zeros elsewhere and without members."""
  shares = jax.nn.softmax(jnp.where(members, logits, jnp.finfo(jnp.float32).min), axis=-1)
  return jnp.where(members, shares, 0.)
