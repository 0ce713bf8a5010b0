"""Dispatch by products with one-hot tensors (GShard, arXiv:2006.16668, algorithm 1).

Costs 2*S*C*E*D multiplications per group in each direction, so groups must be small; in return it is only matmuls,
which GSPMD turns into all-to-alls automatically.
"""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher
from moejax.dispatch.rows import from_buffers, to_buffers
from moejax.experts.layouts import Buffers, row_ids
from moejax.routing.plans import SlotPlan, SoftPlan, TokenPlan


@DISPATCHERS('einsum')
@dataclasses.dataclass(frozen=True)
class Einsum(Dispatcher):
  """Slots are sums of tokens, tokens are sums of slots. Combine weights are rounded to the dtype of `x`."""

  @classmethod
  def supports(cls, plan_type, placed):
    """Plans with slots."""
    return plan_type in (SoftPlan, SlotPlan, TokenPlan) and placed

  def run(self, plan, x, experts):
    """See `Dispatcher.run`."""
    soft = _one_hot(plan)
    groups, _, num_experts, capacity = soft.dispatch.shape
    rows = to_buffers(jnp.einsum('gsec,gsd->gecd', soft.dispatch.astype(x.dtype), x))
    ids = _row_ids(soft, mixtures=isinstance(plan, SoftPlan))
    y = experts(rows, Buffers(ids.swapaxes(0, 1).reshape(num_experts, groups * capacity)))
    y = from_buffers(y.astype(x.dtype), groups)
    return jnp.einsum('gsec,gecd->gsd', soft.combine.astype(x.dtype), y, preferred_element_type=jnp.float32)


def _one_hot(plan):
  if isinstance(plan, SoftPlan):
    return plan
  if isinstance(plan, SlotPlan):
    return plan.to_soft()
  # Products instead of the scatters of `to_slots`, because GSPMD partitions them.
  expert = jax.nn.one_hot(jnp.where(plan.kept, plan.expert, plan.num_experts), plan.num_experts)
  slot = jax.nn.one_hot(plan.slot, plan.capacity)
  return SoftPlan(dispatch=jnp.einsum('gske,gskc->gsec', expert, slot),
                  combine=jnp.einsum('gske,gskc->gsec', expert * plan.kept_weight[..., None], slot,
                                     precision='highest'))


def _row_ids(soft, mixtures):
  # <int32>[G,E,C]: a slot that mixes tokens gets an id of its own; any other gets its token's.
  groups, tokens, num_experts, capacity = soft.dispatch.shape
  group, expert = jnp.arange(groups)[:, None, None], jnp.arange(num_experts)[:, None]
  if mixtures:
    return (expert * groups + group) * capacity + jnp.arange(capacity)
  return row_ids(group * tokens + jnp.argmax(soft.dispatch, axis=1), expert, num_experts)
