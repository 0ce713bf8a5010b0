"""Towards understanding MoE: top-1 with uniform noise, weighted by the noisy logit."""
from typing import Any, Literal

from flax import nnx
import jax
from jaxtyping import Array, Float32

from moejax import functional
from moejax.routing.logits import product, vectors
from moejax.routing.papers import paper
from moejax.routing.stages import SCORES, Score, Scores, noiseless, required


@SCORES('uniform_noise')
class UniformNoise(Score):
  """`x W`, plus in training uniform noise in [0, 1) for every token and expert (section 3). W is initialised to 0."""

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs):
    shape = (vectors(dim), num_experts)
    self.kernel = functional.parameter(rngs, nnx.initializers.zeros, shape, ('embed', None))

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]."""
    clean = product(features, self.kernel[...])
    if not train:
      return noiseless(clean)
    logits = clean + jax.random.uniform(required(key, 'score "uniform_noise"'), clean.shape)
    return Scores(logits=logits, select=logits, clean=clean)


@paper('Towards Understanding Mixture of Experts in Deep Learning', '2208.02813', draws=True)
def understanding_moe(weight: Literal['logit', 'softmax'] = 'logit', balance: float = 0.) -> dict[str, Any]:
  """Towards Understanding Mixture of Experts in Deep Learning (arXiv 2208.02813).

  Section 3: the expert with the largest logit plus uniform noise. In uclaml/MoE its output is multiplied by that noisy
  logit in the experiments on synthetic data, and by its softmax, with a balance loss of 0.01, on images.
  """
  return dict(
      score=dict(name='uniform_noise'),
      select=dict(name='top_k', k=1),
      weigh=dict(name=weight),
      place=dict(name='dropless'),
      balance=dict(switch=dict(coefficient=balance, convention='gshard')) if balance else {})
