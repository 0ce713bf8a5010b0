"""GMoE: V-MoE with a cosine router, which generalises across domains."""
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.ranges import NonNegative
from moejax.routing.balance.requirements import choosing
from moejax.routing.papers import paper
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import group_mean


def tutel_loss(logits: Float32[Array, 'G S E'], clean: Float32[Array, 'G S E'], k: int,
               valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """The average of V-MoE's importance and load losses, in Tutel's form.

  Tutel's load is the probability that noise lifts an expert's *probability* above the k-th best noisy *logit*; its
  variances are unbiased, E/(E-1) times V-MoE's.

  Args:
    logits: <float32>[G,S,E], with noise.
    clean: <float32>[G,S,E], without.
    k: K.
    valid: <bool>[G,S].
  """
  num_experts = clean.shape[-1]
  probs = jax.nn.softmax(clean, axis=-1)
  threshold = jnp.take_along_axis(logits, top_k(logits, k)[..., -1:], axis=-1)
  lifted = jax.scipy.stats.norm.cdf((probs - threshold) * num_experts)
  def squared_variation(values):
    total = jnp.sum(jnp.where(valid[..., None], values, 0), axis=1)
    unbiased = total.var(-1) * num_experts / max(num_experts - 1, 1)
    return unbiased / (total.mean(-1)**2 + 1e-10)
  return group_mean((squared_variation(probs) + squared_variation(lifted)) / 2, valid)


@BALANCERS('tutel')
class Tutel(Balancer):
  """See `tutel_loss`; assumes Tutel's noise, of standard deviation 1/E."""

  def __init__(self, *, k: int | None, coefficient: NonNegative):
    self.k, self.coefficient = choosing(k), coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return tutel_loss(routed.scores.logits, routed.scores.clean, self.k, routed.valid)


@paper('Sparse Mixture-of-Experts are Domain Generalizable Learners', '2206.04046', draws=True,
       example=dict(dim=6, capacity_factor=1.), alone=dict(dim=6))
def gmoe(k: int = 1, dim: int = 256, capacity_factor: float = 1.5,
         balance: Literal['tutel', 'vmoe'] = 'tutel') -> dict[str, Any]:
  """Sparse Mixture-of-Experts are Domain Generalizable Learners (arXiv 2206.04046).

  Section 4: the cosine router of X-MoE in the MoE layers of V-MoE. Hyperparameters as in its code, which uses Tutel: a
  projection to `dim` dimensions with a bias, both sides of unit length, a learned scale exp(min(theta, log 100)) that
  starts at 2, noise of 1/E, k = 1, capacity factor 1.5 by batch priority, and 0.01 times the mean of importance and
  load loss in Tutel's form (`balance='vmoe'`: in V-MoE's).
  """
  losses = dict(tutel=dict(tutel=0.01), vmoe=dict(importance=0.005, load=0.005))
  return dict(
      score=dict(name='cosine', project=dim, project_bias=True, normalize='both', epsilon=1e-12,
                 temperature='exponential', temperature_init=0.5, init='normal', init_scale=0.01, noise_std='1/E'),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='before', renormalize='before' if k > 1 else 'never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, convention='tutel', priority='batch'),
      balance=losses[balance])
