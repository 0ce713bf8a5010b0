"""A capacity whose dispatch has a gradient too (st-moe-pytorch)."""
import dataclasses

import jax
from jaxtyping import Array, Float32

from moejax.routing.place.capacity import CapacityInOrder
from moejax.routing.plans import SoftPlan, TokenPlan
from moejax.routing.stages import PLACEMENTS


@PLACEMENTS('straight_through')
@dataclasses.dataclass(frozen=True)
class StraightThroughCapacity(CapacityInOrder):
  """A capacity whose dispatch is 1 in value and the combine weight in gradient: `1 + w - stop_gradient(w)`.

  The router thus also learns from the derivative of an expert's output by its input. Makes a SoftPlan (dispatch
  'einsum').

  Config: capacity_factor, eval_capacity_factor, convention and min_capacity of 'capacity'.
  """
  soft = True

  def __call__(self, plan: TokenPlan, gates: Float32[Array, 'G S K'], *, key: jax.Array | None,
               train: bool) -> SoftPlan:
    soft = super().__call__(plan, gates, key=key, train=train).to_slots().to_soft()
    return dataclasses.replace(soft, dispatch=soft.dispatch + soft.combine - jax.lax.stop_gradient(soft.combine))
