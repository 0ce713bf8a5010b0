"""Shares: quotients by a sum that may be tiny, or have nothing in it."""
import jax
import jax.numpy as jnp


def scaled(values: jax.Array) -> jax.Array:
  """`values` <float32>[..., K] over a power of two that makes the largest of them about 1.

  What does not depend on a common factor stays the same to the last bit, and neither it nor its gradient underflows.
  """
  largest = jax.lax.stop_gradient(jnp.abs(values).max(-1, keepdims=True)).astype(jnp.float32)
  exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
  power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
  return values / jnp.where(power > 0, power, 1.)


def normalized(values: jax.Array) -> jax.Array:
  """`values` <float32>[..., K], not negative, over their sum; zeros where the sum is zero, with zero gradient."""
  values = scaled(values)
  total = values.sum(-1, keepdims=True)
  return values / jnp.where(total > 0, total, 1.)


def softmax_over(members: jax.Array, logits: jax.Array) -> jax.Array:
  """Softmax over the members <bool>[..., K] alone of `logits` <float32>[..., K]; zeros elsewhere, and without any."""
  shares = jax.nn.softmax(jnp.where(members, logits, jnp.finfo(jnp.float32).min), axis=-1)
  return jnp.where(members, shares, 0.)
