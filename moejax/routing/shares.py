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


def softmax_over_experts(logits: jax.Array) -> jax.Array:
  """Softmax over all destinations of a token: over E, or jointly over E and C.

  Args:
    logits: <float32>[G,S,E] or [G,S,E,C].

  Returns:
    <float32> of the same shape.
  """
  return jax.nn.softmax(logits, axis=tuple(range(2, logits.ndim)))


def router_probs(gates: jax.Array) -> jax.Array:
  """A distribution over experts per token: the gates divided by their sum, after adding up an expert's slots.

  Args:
    gates: <float32>[G,S,E] or [G,S,E,C], non-negative.

  Returns:
    <float32>[G,S,E] summing to 1 over E.
  """
  gates = gates.sum(-1) if gates.ndim == 4 else gates
  return normalized(gates)
