"""Weights of one."""
import dataclasses

import jax

from moejax.routing.plans import Plan
from moejax.routing.stages import WEIGHTINGS, Weighting


@WEIGHTINGS('one')
@dataclasses.dataclass(frozen=True)
class One(Weighting):
  """Weight one: the router gets no gradient from the output (Hash Layers, THOR)."""

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    return plan
