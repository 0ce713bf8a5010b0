"""Normalisation over the last dimension. Statistics are float32 for any dtype of the activations."""
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.config import Registry
from moejax.ranges import NonNegative


class Norm(nnx.Module):
  """Base class of norms."""

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    """x: <float>[...,D]; the result has its dtype."""
    raise NotImplementedError


NORMS = Registry('norm', Norm, context=('dim', 'axis', 'rngs'))


@NORMS('layer_norm')
class LayerNorm(Norm):
  """`scale * (x - mean) / sqrt(variance + epsilon) + bias` (1607.06450).

  Config:
    epsilon: added to the variance.
    use_bias: whether a bias is added.
  """

  def __init__(self, *, dim: int, axis: str, rngs: nnx.Rngs, epsilon: NonNegative = 1e-6, use_bias: bool = True):
    self.epsilon = epsilon
    self.scale = functional.parameter(rngs, nnx.initializers.ones, (dim,), (axis,))
    self.bias = functional.parameter(rngs, nnx.initializers.zeros, (dim,), (axis,)) if use_bias else None

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    """x: <float>[...,D]; the result has its dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
    return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


@NORMS('rms_norm')
class RMSNorm(Norm):
  """`scale * x / sqrt(mean(x^2) + epsilon)`, without centring or bias (1910.07467).

  Config:
    epsilon: added to the mean square.
  """

  def __init__(self, *, dim: int, axis: str, rngs: nnx.Rngs, epsilon: NonNegative = 1e-6):
    self.epsilon = epsilon
    self.scale = functional.parameter(rngs, nnx.initializers.ones, (dim,), (axis,))

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    """x: <float>[...,D]; the result has its dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
    return y.astype(x.dtype)
