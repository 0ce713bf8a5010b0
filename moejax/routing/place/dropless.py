"""No capacity."""
import dataclasses

import jax
from jaxtyping import Array, Float32

from moejax.routing.plans import Leak, Plan
from moejax.routing.stages import PLACEMENTS, Placement


@PLACEMENTS('dropless')
@dataclasses.dataclass(frozen=True)
class Dropless(Placement):
  """No capacity: every selected choice is computed."""

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, plan: Plan, gates: Float32[Array, 'G ...'], *, key: jax.Array | None, train: bool) -> Plan:
    return plan
