"""The activations."""
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from moejax.routing.inputs import RouterInputs
from moejax.routing.stages import FEATURES, Feature


@FEATURES('token')
class Token(Feature):
  """The activations themselves."""

  def __init__(self, *, dim: int):
    self.width = dim

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Float32[Array, 'G S D']:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D]."""
    return x.astype(jnp.float32)
