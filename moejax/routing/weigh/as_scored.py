"""Weightings that use the scores themselves as combine weights."""
import dataclasses

import jax

from moejax.routing.logits import softmax_over_experts
from moejax.routing.plans import Plan
from moejax.routing.stages import WEIGHTINGS, Weighting


@WEIGHTINGS('as_scored')
@dataclasses.dataclass(frozen=True)
class AsScored(Weighting):
  """The scores themselves, which must be non-negative shares of the experts (DSelect-k, COMET)."""

  def gates(self, logits: jax.Array) -> jax.Array:
    return logits

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    return plan.scale(plan.pick(logits))


@WEIGHTINGS('logit')
@dataclasses.dataclass(frozen=True)
class Logit(AsScored):
  """The logits themselves, positive or negative ("Towards Understanding Mixture of Experts", section 3)."""

  def gates(self, logits: jax.Array) -> jax.Array:
    return softmax_over_experts(logits)
