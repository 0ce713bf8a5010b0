"""The score of Soft MoE: one logit per slot."""
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.ranges import Count
from moejax.routing.logits import vectors
from moejax.routing.stages import SCORES, Score, Scores, noiseless


def soft_moe_logits(x: Float32[Array, 'G S D'], phi: Float32[Array, 'D E C'],
                    scale: Float32[Array, '']) -> Float32[Array, 'G S E C']:
  """`scale * <x/|x|, phi/|phi|>` (Soft MoE, section 2.3; with 1e-6 inside the root as in google-research/vmoe).

  Args:
    x: <float32>[G,S,D].
    phi: <float32>[D,E,C].
    scale: <float32> scalar.

  Returns:
    <float32>[G,S,E,C].
  """
  x *= jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
  phi *= scale * jax.lax.rsqrt(jnp.sum(phi**2, axis=0, keepdims=True) + 1e-6)
  return jnp.einsum('gsd,dec->gsec', x, phi, precision=jax.lax.Precision.HIGHEST)


@SCORES('soft_moe')
class SoftMoE(Score):
  """Cosine of tokens and slots times a learned scale (Soft MoE, section 2.3). `slots`: C, slots per expert.

  Slots are initialised with lecun normal of [D,E,C], of standard deviation 1/sqrt(D*E), as in google-research/vmoe:
  only their directions matter, but the shorter they are, the faster Adam turns them.
  """

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, slots: Count = 1):
    dim = vectors(dim)
    self.slots = slots
    self.phi = functional.parameter(rngs, nnx.initializers.lecun_normal(), (dim, num_experts, slots),
                                    ('embed', None, None))
    self.scale = functional.parameter(rngs, nnx.initializers.ones, (), ())

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]; logits [G,S,E,C]."""
    return noiseless(soft_moe_logits(features, self.phi[...], self.scale[...]))
