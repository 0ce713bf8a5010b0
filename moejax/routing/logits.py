"""Router logits and what they become: the product of features and kernel, and shares by softmax or by sums.

Sums may be tiny or zero: they are scaled before they divide.
"""
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.config import ConfigError


def vectors(dim: int | None) -> int:
  """The width of the features; raises ConfigError if they are ids."""
  if dim is None:
    raise ConfigError(': needs vectors, but the features are ids. '
                      "Remove features=dict(name='token_ids'), or score by 'hash'.")
  return dim


def product(features: Float32[Array, 'G S D'], kernel: Float32[Array, 'D E']) -> Float32[Array, 'G S E']:
  """<float32>[G,S,D], <float32>[D,E] -> <float32>[G,S,E], in float32 on every platform."""
  # The default precision of a float32 product is bfloat16 on TPU and TF32 on GPU.
  return jnp.einsum('gsd,de->gse', features, kernel, precision=jax.lax.Precision.HIGHEST)


def uniform_within(bound: float) -> nnx.Initializer:
  """The initialisation of torch's Linear, kernel and bias, where `bound` is 1/sqrt(number of inputs)."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def softmax_over_experts(logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
  """Softmax over all destinations of a token: over E, or jointly over E and C.

  Args:
    logits: <float32>[G,S,E] or [G,S,E,C].

  Returns:
    <float32> of the same shape.
  """
  return jax.nn.softmax(logits, axis=tuple(range(2, logits.ndim)))


def router_probs(gates: Float32[Array, 'G S E *C']) -> Float32[Array, 'G S E']:
  """A distribution over experts per token: the gates divided by their sum, after adding up an expert's slots.

  Args:
    gates: <float32>[G,S,E] or [G,S,E,C], non-negative.

  Returns:
    <float32>[G,S,E] summing to 1 over E.
  """
  gates = gates.sum(-1) if gates.ndim == 4 else gates
  return normalized(gates)


def softmax_over(members: Bool[Array, '*G K'], logits: Float32[Array, '*G K']) -> Float32[Array, '*G K']:
  """Softmax of `logits` <float32>[..., K] over `members` <bool>[..., K] only; zeros elsewhere and without members."""
  shares = jax.nn.softmax(jnp.where(members, logits, jnp.finfo(jnp.float32).min), axis=-1)
  return jnp.where(members, shares, 0.)


def normalized(values: Float32[Array, '*G K']) -> Float32[Array, '*G K']:
  """`values` <float32>[..., K], non-negative, divided by their sum; zeros, with zero gradient, if the sum is zero."""
  values = scaled(values)
  total = values.sum(-1, keepdims=True)
  return values / jnp.where(total > 0, total, 1.)


def scaled(values: Float32[Array, '*G K']) -> Float32[Array, '*G K']:
  """`values` <float32>[..., K] divided by the power of two that brings the largest into [1, 2).

  Results that are invariant to a common factor stay bit-identical, and neither they nor their gradients underflow.
  """
  largest = jax.lax.stop_gradient(jnp.abs(values).max(-1, keepdims=True)).astype(jnp.float32)
  exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
  power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
  return values / jnp.where(power > 0, power, 1.)
