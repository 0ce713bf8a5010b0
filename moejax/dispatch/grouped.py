"""Dropless dispatch: choices are sorted by expert, then grouped matmuls (MegaBlocks, arXiv:2211.15841).

Only routed tokens are computed: no capacity, no empty slots.
"""
import dataclasses

import jax.numpy as jnp

from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher
from moejax.dispatch.exchange import Dropless, over_devices
from moejax.dispatch.rows import add_rows, sum_choices, take_or_zeros, take_rows
from moejax.experts.layouts import Ragged, row_ids
from moejax.kernels import Name, Routes, expert_block
from moejax.kernels.routes import by_expert
from moejax.ranges import Count
from moejax.routing.plans import SlotPlan, TokenPlan


@DISPATCHERS('grouped')
@dataclasses.dataclass(frozen=True)
class Grouped(Dispatcher):
  """Feed-forward experts run as one fused block; other experts get sorted rows, and their outputs are summed.

  Attributes:
    implementation: of the kernels; None: by platform and shape.
    exchange: how tokens are sent to the devices of their experts; None: the method with less traffic.
    chunks: on a mesh, the number of parts in which a device's tokens are sent.
  """
  implementation: Name | None = None
  exchange: Dropless | None = None
  chunks: Count = 1

  @classmethod
  def supports(cls, plan_type, placed):
    """Plans with discrete assignments."""
    return plan_type in (SlotPlan, TokenPlan)

  def run(self, plan, x, experts):
    """See `Dispatcher.run`."""
    tokens = x.reshape(-1, x.shape[-1])
    routes, order = (_routes_of_choices if isinstance(plan, TokenPlan) else _routes_of_slots)(plan)
    if block := experts.block():
      y = expert_block(tokens.astype(block.weights.wi.dtype), block.weights, routes, activation=block.activation,
                       implementation=self.implementation)
    else:
      y = self._sorted(plan, tokens, routes, order, experts)
    return y.reshape(x.shape)

  def run_on_mesh(self, plan, x, experts):
    """See `Dispatcher.run_on_mesh`."""
    return over_devices(self.run, plan, x, experts, method=self.exchange, chunks=self.chunks)

  def _sorted(self, plan, x, routes, order, experts):
    num_tokens, num_rows, num_experts = len(x), len(routes.token), len(routes.group_sizes)
    expert = jnp.searchsorted(jnp.cumsum(routes.group_sizes), jnp.arange(num_rows), side='right')
    layout = Ragged(expert, routes.group_sizes, row_ids(routes.token, expert, num_experts),
                    self.implementation)
    if routes.position is None:
      y = routes.weight[:, None] * experts(take_or_zeros(x[None], routes.token[None])[0], layout)
      return add_rows(y[None], routes.token[None], num_tokens)
    position = routes.position[None]
    y = experts(take_rows(x[None], routes.token[None], position)[0], layout)
    return sum_choices(y[None], position, order[None], plan.kept_weight.reshape(position.shape))


def _routes_of_choices(plan):
  # Routes of the choices sorted by expert, dropped choices last; and the choice of each row.
  choices = plan.expert.shape[-1]
  expert = jnp.where(plan.kept, plan.expert, plan.num_experts).reshape(-1)
  order, position, sizes = by_expert(expert, plan.num_experts)
  weight = take_rows(plan.kept_weight.reshape(1, -1, 1), order[None], position[None, :, None])[0, :, 0]
  return Routes(order // choices, weight, sizes, position.reshape(-1, choices)), order


def _routes_of_slots(plan):
  shape = plan.token.shape
  expert = jnp.where(plan.filled, jnp.arange(plan.num_experts)[:, None], plan.num_experts).reshape(-1)
  order, _, sizes = by_expert(expert, plan.num_experts)
  token = plan.token + plan.num_tokens * jnp.arange(shape[0])[:, None, None]
  token = jnp.where(plan.filled, token, plan.num_tokens * shape[0]).reshape(-1)
  weight = plan.kept_weight.reshape(-1)[order]
  return Routes(token[order], weight, sizes), order
