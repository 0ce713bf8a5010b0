"""Weights of one."""
import dataclasses

from jaxtyping import Array, Float32

from moejax.routing.plans import Plan
from moejax.routing.stages import WEIGHTINGS, Weighting


@WEIGHTINGS('one')
@dataclasses.dataclass(frozen=True)
class One(Weighting):
  """Weight one: the router gets no gradient from the output (Hash Layers, THOR)."""

  def weigh(self, plan: Plan, logits: Float32[Array, 'G S *E']) -> Plan:
    return plan
