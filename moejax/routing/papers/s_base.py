"""S-BASE: BASE's balanced assignment, relaxed to a transport plan found by Sinkhorn iterations."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.ranges import Count, Positive
from moejax.routing.papers import paper
from moejax.routing.plans import Plan
from moejax.routing.select import optimal_transport
from moejax.routing.select.assignment import TrainedTogether
from moejax.routing.stages import SELECTIONS, Scores


@SELECTIONS('sinkhorn')
@dataclasses.dataclass(frozen=True)
class Sinkhorn(TrainedTogether):
  """Training: the largest entry of the token's row in the entropic transport plan; evaluation: the best expert.

  The plan gives every expert the same mass, so the choices are nearly balanced.

  Config:
    epsilon: weight of the entropy; the smaller, the closer the choices are to an assignment.
    iterations: Sinkhorn iterations.
  """
  epsilon: Positive = 1.
  iterations: Count = 20

  k = 1

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    select = scores.select
    if train:
      def transport(scores, valid):
        tokens = valid.astype(jnp.float32)
        experts = jnp.full(self.num_experts, tokens.sum() / self.num_experts)
        return optimal_transport.sinkhorn(scores, tokens, experts, self.epsilon, self.iterations)
      select = jax.vmap(transport)(jax.lax.stop_gradient(select), valid)
    return self.plan(jnp.argmax(select, axis=-1)[..., None], valid)


@paper('Unified Scaling Laws for Routed Language Models', '2202.01169', chooses='together',
       example=dict(epsilon=0.2, capacity_factor=1.))
def s_base(epsilon: float = 1., iterations: int = 20, capacity_factor: float = 2.) -> dict[str, Any]:
  """S-BASE of Unified Scaling Laws for Routed Language Models (arXiv 2202.01169).

  Section 3.2.1: training routes each token to the largest entry of its row in the entropic transport plan between
  tokens and experts of equal mass; evaluation to its best expert. The output is weighted by the softmax probability. No
  code was published: regularisation and iterations are those of google-research/vmoe's KL baseline (epsilon 1, 20
  iterations), the capacity is twice an equal share.
  """
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='sinkhorn', epsilon=epsilon, iterations=iterations),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor))
