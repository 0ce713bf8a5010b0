"""Dispatch by gathers: each slot reads its token, each token reads its slots. No one-hot products."""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher
from moejax.dispatch.exchange import over_devices
from moejax.dispatch.rows import add_rows, from_buffers, sum_choices, take_or_zeros, take_rows, to_buffers
from moejax.experts.layouts import Buffers, row_ids
from moejax.ranges import Count
from moejax.routing.plans import SlotPlan, TokenPlan


@DISPATCHERS('gather')
@dataclasses.dataclass(frozen=True)
class Gather(Dispatcher):
  """Gathers rows into buffers [E,G*C,D]; experts are batched matmuls over them, including empty slots.

  A TokenPlan gives the slot of each choice and hence the choice of each slot, so forward and backward only gather. A
  SlotPlan gives only the token of each slot, so its outputs are scattered.

  Attributes:
    chunks: on a mesh, the number of parts in which buffers are sent (`exchange`).
  """
  chunks: Count = 1

  @classmethod
  def supports(cls, plan_type, placed):
    """Plans whose slots hold one token each."""
    return plan_type in (SlotPlan, TokenPlan) and placed

  def run(self, plan, x, experts):
    """See `Dispatcher.run`."""
    return (_run_tokens if isinstance(plan, TokenPlan) else _run_slots)(plan, x, experts)

  def run_on_mesh(self, plan, x, experts):
    """See `Dispatcher.run_on_mesh`."""
    return over_devices(self.run, plan, x, experts, method='all_to_all', chunks=self.chunks)


def _run_tokens(plan, x, experts):
  groups, tokens, choices = plan.expert.shape
  slots = plan.num_experts * plan.capacity
  slot_of_choice = jnp.where(plan.kept, plan.expert * plan.capacity + plan.slot, slots)
  choice_of_slot = _inverse(slot_of_choice.reshape(groups, -1), slots)
  token = choice_of_slot // choices  # S where the slot is empty
  rows = take_rows(x, token, slot_of_choice)
  y = _on_buffers(rows, token, plan, experts)
  return sum_choices(y, slot_of_choice, choice_of_slot, plan.kept_weight)


def _inverse(target, size):
  # source <int32>[G,size] with target[source[n]] == n, or M if no target is n; target <int32>[G,M].
  count = target.shape[1]
  return jax.vmap(lambda target: jnp.full(size, count).at[target].set(jnp.arange(count), mode='drop'))(target)


def _run_slots(plan, x, experts):
  groups, tokens, _ = x.shape
  token = jnp.where(plan.filled, plan.token, tokens).reshape(groups, -1)
  y = _on_buffers(take_or_zeros(x, token), token, plan, experts)
  return add_rows(plan.kept_weight.reshape(groups, -1, 1) * y, token, tokens)


def _on_buffers(rows, token, plan, experts):
  # rows <float>[G,E*C,D] and their tokens <int32>[G,E*C] -> <float>[G,E*C,D].
  groups, _, dim = rows.shape
  num_tokens = plan.expert.shape[1] if isinstance(plan, TokenPlan) else plan.num_tokens
  shape = (groups, plan.num_experts, plan.capacity)
  ids = row_ids(token.reshape(shape) + num_tokens * jnp.arange(groups)[:, None, None],
                jnp.arange(plan.num_experts)[:, None], plan.num_experts)
  buffers = to_buffers(rows.reshape(*shape, dim))
  y = experts(buffers, Buffers(ids.swapaxes(0, 1).reshape(plan.num_experts, -1)))
  return from_buffers(y, groups).reshape(groups, -1, dim)
