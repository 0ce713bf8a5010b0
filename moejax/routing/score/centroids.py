"""Centroids: one vector per expert, and its dot product with a token (BASE layers and their successors)."""
from flax import nnx
import jax
from jaxtyping import Array, Float32

from moejax import functional
from moejax.ranges import NonNegative
from moejax.routing.logits import product, vectors
from moejax.routing.stages import SCORES, Score, Scores, noiseless


@SCORES('centroids')
class Centroids(Score):
  """`<x, w_e>` with orthogonally initialised vectors, as in fairseq's `BaseLayer`.

  Config:
    gain: initial length of the vectors.
  """

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, gain: NonNegative = 0.1):
    self.kernel = functional.parameter(rngs, nnx.initializers.orthogonal(gain), (vectors(dim), num_experts),
                                       ('embed', None))

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]."""
    return noiseless(product(features, self.kernel[...]))
