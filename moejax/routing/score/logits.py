"""What scores have in common: the product with a kernel, its initialisation, and Gaussian noise."""
from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.routing.stages import Scores


def gaussian(clean: jax.Array, noise_std: float, key: jax.Array, extras: Mapping[str, jax.Array] = {}) -> Scores:
  """`clean` logits <float32>[G,S,E] plus Gaussian noise with the same standard deviation for all."""
  logits = clean + noise_std * jax.random.normal(key, clean.shape)
  return Scores(logits=logits, select=logits, clean=clean, noise_std=jnp.float32(noise_std), extras=dict(extras))


def vectors(dim: int | None) -> int:
  """The width of the features; raises ConfigError if they are ids."""
  if dim is None:
    raise ConfigError(': needs vectors, but the features are ids. '
                      "Remove features=dict(name='token_ids'), or score by 'hash'.")
  return dim


def product(features: jax.Array, kernel: jax.Array) -> jax.Array:
  """<float32>[G,S,D], <float32>[D,E] -> <float32>[G,S,E], in float32 on every platform."""
  # The default precision of a float32 product is bfloat16 on TPU and TF32 on GPU.
  return jnp.einsum('gsd,de->gse', features, kernel, precision=jax.lax.Precision.HIGHEST)


def uniform_within(bound: float) -> nnx.Initializer:
  """The initialisation of torch's Linear, kernel and bias, where `bound` is 1/sqrt(number of inputs)."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
