"""Weightings that use the scores themselves as combine weights."""
import dataclasses

from jaxtyping import Array, Float32

from moejax.routing.logits import softmax_over_experts
from moejax.routing.plans import Plan
from moejax.routing.stages import WEIGHTINGS, Weighting


@WEIGHTINGS('as_scored')
@dataclasses.dataclass(frozen=True)
class AsScored(Weighting):
  """The scores themselves, which must be non-negative shares of the experts (DSelect-k, COMET)."""

  def gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    return logits

  def weigh(self, plan: Plan, logits: Float32[Array, 'G S *E']) -> Plan:
    return plan.scale(plan.pick(logits))


@WEIGHTINGS('logit')
@dataclasses.dataclass(frozen=True)
class Logit(AsScored):
  """The logits themselves, positive or negative ("Towards Understanding Mixture of Experts", section 3)."""

  def gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    return softmax_over_experts(logits)
