"""Strictly balanced gating: experts take their best tokens in training, and tokens above a threshold at inference."""
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax import functional
from moejax.ranges import NonNegative, Positive
from moejax.routing.logits import softmax_over_experts
from moejax.routing.papers import paper
from moejax.routing.place import conventions
from moejax.routing.plans import Leak, Plan, slot_plan, token_plan
from moejax.routing.score.linear import LinearScore
from moejax.routing.select.expert_choice import expert_choice
from moejax.routing.stages import (BALANCERS, SCORES, SELECTIONS, WEIGHTINGS, Balancer, Routed, Scores, Selection,
                                   Weighting)


@SCORES('linear_with_thresholds')
class LinearWithThresholds(LinearScore):
  """The score 'linear', plus a threshold on the gates of each expert, trained by the balancer 'threshold'.

  Thresholds start at 1/E, the uniform gate.
  """

  gives = ('threshold',)

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, init_std: NonNegative = 0.02):
    super().__init__(dim=dim, num_experts=num_experts, rngs=rngs, init_std=init_std)
    self.threshold = functional.parameter(rngs, nnx.initializers.constant(1 / num_experts), (num_experts,), (None,))

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    scores = super().__call__(features, key=key, train=train)
    return dataclasses.replace(scores, extras={**scores.extras, 'threshold': self.threshold[...]})


@SELECTIONS('batchwise')
@dataclasses.dataclass(frozen=True)
class Batchwise(Selection):
  """Training: each expert takes the m = k*S/E tokens of its group with the largest gates; evaluation: all tokens above
  the threshold of score 'linear_with_thresholds' (Shazeer et al. 2017, equations 18 and 19).

  Config:
    experts_per_token: k, average number of experts per token.
  """
  num_experts: int
  experts_per_token: Positive

  k = None
  reads = ('threshold',)

  def leak(self, train: bool) -> Leak:
    return 'future' if train else 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    gates = softmax_over_experts(scores.select)
    if not train:
      expert = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gates.shape)
      return token_plan(expert, (gates > scores.extras['threshold']) & valid[..., None], self.num_experts)
    tokens = valid.shape[1]
    slots = conventions.slots_that_choose(tokens, self.num_experts, self.experts_per_token,
                                        'experts_per_token')
    token, filled = expert_choice(gates, valid, slots)
    return slot_plan(token, filled, tokens)


@WEIGHTINGS('softmax_over_takers')
@dataclasses.dataclass(frozen=True)
class SoftmaxOverTakers(Weighting):
  """Softmax over the experts that took the token, whatever their number (Shazeer et al. 2017, equation 16)."""

  def weigh(self, plan: Plan, logits: Float32[Array, '... E']) -> Plan:
    taken = plan.shares() > 0
    taken = taken[..., None] if logits.ndim == 4 else taken
    weight = softmax_over_experts(jnp.where(taken, logits, jnp.finfo(jnp.float32).min))
    return plan.scale(plan.pick(weight))


def threshold_loss(gates: Float32[Array, 'G S E'], threshold: Float32[Array, 'E'], taken: Bool[Array, 'G S E'],
                   valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """`sum_e (above_te - taken_te) (gate_te - threshold_e)`, averaged over valid tokens t; 0 if both masks are equal.

  Shazeer et al. 2017, equation 20, which sums over tokens. It raises the threshold of an expert that has more tokens
  above it than it took.

  Args:
    gates: <float32>[G,S,E].
    threshold: <float32>[E].
    taken: <bool>[G,S,E] the batchwise selection.
    valid: <bool>[G,S].
  """
  above = gates > threshold
  misplaced = (above.astype(jnp.float32) - taken) * (gates - threshold)
  return jnp.sum(misplaced * valid[..., None]) / jnp.maximum(valid.sum(), 1)


@BALANCERS('threshold')
class Threshold(Balancer):
  """See `threshold_loss`."""

  reads = ('threshold',)

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return threshold_loss(routed.probs, routed.scores.extras['threshold'], routed.plan.shares() > 0, routed.valid)


@paper('Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer', '1701.06538',
       chooses='expert', example=dict(k=1))
def strictly_balanced(k: float = 4., coefficient: float = 1.) -> dict[str, Any]:
  """Strictly balanced gating: appendix F of The Sparsely-Gated Mixture-of-Experts Layer (arXiv 1701.06538).

  Equations 16 and 18: softmax gates; each expert keeps the k|X|/n largest of the batch, and a token's gates are
  normalised over the experts that kept it. Equations 19 and 20: inference keeps gates above a threshold per expert,
  learned by its own loss. No noise, and no other loss. `k`: average number of experts per token. The paper gives
  neither the loss's coefficient nor the initial thresholds: here 1, as a mean over tokens, and 1/n.
  """
  return dict(
      score=dict(name='linear_with_thresholds', init_std=0.02),
      select=dict(name='batchwise', experts_per_token=k),
      weigh=dict(name='softmax_over_takers'),
      place=dict(name='dropless'),
      balance=dict(threshold=coefficient))
