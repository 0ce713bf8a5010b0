"""Centroids: one vector an expert, and how much a token points its way (BASE layers and those built on them)."""
from flax import nnx
import jax

from moejax import functional
from moejax.ranges import NonNegative
from moejax.routing.scores import SCORES, Score, Scores, noiseless, product, vectors


@SCORES('centroids')
class Centroids(Score):
  """`<x, w_e>` with vectors that start orthogonal, as in fairseq's `BaseLayer`.

  Config:
    gain: length of the vectors at the start.
  """

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, gain: NonNegative = 0.1):
    self.kernel = functional.parameter(rngs, nnx.initializers.orthogonal(gain), (vectors(dim, where), num_experts),
                                       ('embed', None))

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]."""
    return noiseless(product(features, self.kernel[...]))
