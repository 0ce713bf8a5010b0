"""The activations."""
import jax
import jax.numpy as jnp

from moejax.routing.inputs import RouterInputs
from moejax.routing.stages import FEATURES, Feature


@FEATURES('token')
class Token(Feature):
  """The activations themselves."""

  def __init__(self, *, dim: int):
    self.width = dim

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D]."""
    return x.astype(jnp.float32)
