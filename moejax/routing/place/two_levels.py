"""Capacities of groups of experts and of the experts in them (`MoE2D` of Mesh TensorFlow); see `score.hierarchical`."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax.ranges import Positive
from moejax.routing.place.capacity import check_choosing
from moejax.routing.place.conventions import capacity, checked_slots
from moejax.routing.place.queues import slots_in_order
from moejax.routing.plans import Leak, TokenPlan
from moejax.routing.score.hierarchical import Groups
from moejax.routing.stages import PLACEMENTS, Placement


@PLACEMENTS('two_level_capacity')
@dataclasses.dataclass(frozen=True)
class TwoLevelCapacity(Placement):
  """Capacities of groups, and of the experts within a group among the tokens that have a slot of it (`MoE2D`).

  A group has T = max(min(S, int(S * factor / N)), 4) slots, which first choices take first; each of its experts has
  max(min(T, int(T * factor / M)), 4), with a capacity factor of its own.

  Config:
    groups: N.
    capacity_factor, eval_capacity_factor: for groups.
    second_level_factor: for the experts of a group.
  """
  num_experts: int
  k: int | None
  groups: Groups
  capacity_factor: Positive = 1.25
  eval_capacity_factor: Positive = 2.
  second_level_factor: Positive = 1.

  def __post_init__(self):
    check_choosing(self.k)

  def leak(self, train: bool) -> Leak:
    return 'slots'

  def slots(self, tokens: int, train: bool) -> tuple[int, int]:
    """(slots of a group of experts, slots of an expert) for routing groups of `tokens`."""
    name = 'capacity_factor' if train else 'eval_capacity_factor'
    factor, second = getattr(self, name), self.second_level_factor
    of_group = checked_slots(capacity(tokens, self.groups, 2, factor, 'mesh_tensorflow'), tokens, factor,
                             name)
    size = self.num_experts // self.groups
    of_expert = capacity(of_group, size, 2, second, 'mesh_tensorflow')
    return of_group, checked_slots(of_expert, of_group, second, 'second_level_factor')

  def __call__(self, plan: TokenPlan, gates: Float32[Array, 'G S K'], *, key: jax.Array | None,
               train: bool) -> TokenPlan:
    of_group, of_expert = self.slots(plan.expert.shape[1], train)
    group = plan.expert // (self.num_experts // self.groups)
    # The first choice represents its group, and the last choice the other group, if any.
    ends = jnp.stack([group[..., 0], group[..., -1]], axis=-1)
    apart = jnp.stack([plan.kept[..., 0], plan.kept[..., -1] & (ends[..., 0] != ends[..., 1])], axis=-1)
    has_slot = apart & (slots_in_order(ends, apart, self.groups) < of_group)
    kept = plan.kept & jnp.where(group == ends[..., :1], has_slot[..., :1], has_slot[..., 1:])
    # A group's slots hold first choices, then second ones, each in token order, as do the choices of a plan.
    slot = slots_in_order(plan.expert, kept, self.num_experts)
    return dataclasses.replace(plan, kept=kept & (slot < of_expert), slot=slot, capacity=of_expert)
