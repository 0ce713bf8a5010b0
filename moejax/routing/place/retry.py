"""A capacity where tokens of a full expert try their next best (no-token-left-behind; Switch Transformer, appendix B)."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.routing.place.capacity import CapacityInOrder
from moejax.routing.place.queues import slots_in_order
from moejax.routing.plans import Leak, TokenPlan
from moejax.routing.stages import PLACEMENTS


def slots_with_retries(expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S'], num_experts: int,
                       capacity: int) -> tuple[Bool[Array, 'G S K'], Int[Array, 'G S K']]:
  """Assigns slots in rounds: in each, tokens still without a slot try their next expert, in order of position.

  Args:
    expert: <int32>[G,S,K], best first.
    routed: <bool>[G,S]; other tokens take no slot.
    num_experts: E.
    capacity: C.

  Returns:
    kept <bool>[G,S,K], at most one choice per token, and slot <int32>[G,S,K] of the kept choices.
  """
  taken = jnp.zeros((len(expert), num_experts), jnp.int32)
  waiting, kept, slots = routed, [], []
  for choice in jnp.moveaxis(expert, -1, 0):
    names = choice[..., None] == jnp.arange(num_experts)
    slot = slots_in_order(choice[..., None], waiting[..., None], num_experts)[..., 0]
    slot += jnp.sum(jnp.where(names, taken[:, None], 0), axis=-1)
    fits = waiting & (slot < capacity)
    taken += jnp.sum(names & fits[..., None], axis=1)
    waiting &= ~fits
    kept.append(fits)
    slots.append(slot)
  return jnp.stack(kept, axis=-1), jnp.stack(slots, axis=-1)


@PLACEMENTS('retry')
@dataclasses.dataclass(frozen=True)
class Retry(CapacityInOrder):
  """A capacity where tokens of a full expert fall back on the next best; see `slots_with_retries`, `Ranked`.

  Config: capacity_factor, eval_capacity_factor, convention and min_capacity of 'capacity'.
  """

  def leak(self, train: bool) -> Leak:
    return 'slots'

  def __call__(self, plan: TokenPlan, gates: Float32[Array, 'G S K'], *, key: jax.Array | None,
               train: bool) -> TokenPlan:
    slots = self.slots(plan.expert.shape[1], train)
    kept, slot = slots_with_retries(plan.expert, plan.kept[..., 0], self.num_experts, slots)
    return dataclasses.replace(plan, kept=kept, slot=slot, capacity=slots)
