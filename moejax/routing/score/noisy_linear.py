"""A linear router with noise of learned size.

Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), equation 4, with the details of
`noisy_top_k_gating` in Tensor2Tensor (`utils/expert_utils.py`).
"""
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.ranges import NonNegative
from moejax.routing.logits import product, vectors
from moejax.routing.stages import SCORES, Score, Scores, noiseless, required


def learned_noise_std(raw: Float32[Array, '...'], floor: float) -> Float32[Array, '...']:
  """`softplus(raw) + floor` (equation 4; only Tensor2Tensor has a floor, 0.01), of the shape of `raw`.

  At least 1e-6, because losses divide by it and the softplus of a large negative number underflows to 0.
  """
  return jnp.maximum(jax.nn.softplus(raw) + floor, 1e-6)


@SCORES('noisy_linear')
class NoisyLinear(Score):
  """`x W + normal * softplus(x W_noise)`, the noise in training only (equation 4).

  Config:
    init_std: initial standard deviation of both kernels; 0 (appendix A): all experts equally likely.
    noise_floor: minimum standard deviation of the noise: 0.01 in Tensor2Tensor, 0 in the paper.
  """

  noisy = True

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, init_std: NonNegative = 0.,
               noise_floor: NonNegative = 1e-2):
    shape, init = (vectors(dim), num_experts), nnx.initializers.normal(init_std)
    self.kernel = functional.parameter(rngs, init, shape, ('embed', None))
    self.noise_kernel = functional.parameter(rngs, init, shape, ('embed', None))
    self.noise_floor = noise_floor

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]; the standard deviation of the noise is [G,S,E]."""
    clean = product(features, self.kernel[...])
    if not train:
      return noiseless(clean)
    std = learned_noise_std(product(features, self.noise_kernel[...]), self.noise_floor)
    logits = clean + std * jax.random.normal(required(key, 'score "noisy_linear"'), clean.shape)
    return Scores(logits=logits, select=logits, clean=clean, noise_std=std)
