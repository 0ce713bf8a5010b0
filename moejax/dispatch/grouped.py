"""Dropless dispatch: choices sorted by expert, then grouped matmuls (MegaBlocks, arXiv:2211.15841).

Work is done for what was routed and nothing else: no capacity, no empty slots. All groups are sorted as one, so on a
mesh whose `expert` axis is not 1 the results are right but every device gathers all expert weights.
"""
import dataclasses

import jax.numpy as jnp

from moejax.dispatch import layouts
from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher
from moejax.kernels.grouped_matmul import Name
from moejax.routing.plans import SlotPlan, TokenPlan


@DISPATCHERS('grouped')
@dataclasses.dataclass(frozen=True)
class Grouped(Dispatcher):
  """Sort, grouped matmul, unsort, weighted sum. Choices that are not kept are sorted behind the last group.

  Attributes:
    implementation: of `kernels.grouped_matmul`; None picks by platform.
  """
  implementation: Name | None = None

  @classmethod
  def supports(cls, plan_type, placed):
    """Plans that say which token meets which expert."""
    return plan_type in (SlotPlan, TokenPlan)

  def run(self, plan, x, experts):
    """See `Dispatcher.run`."""
    tokens = x.reshape(1, -1, x.shape[-1])
    y = (self._run_choices if isinstance(plan, TokenPlan) else self._run_slots)(plan, tokens, experts)
    return y.reshape(x.shape)

  def _run_choices(self, plan, x, experts):
    choices, num_tokens = plan.expert.shape[-1], x.shape[1]
    expert = jnp.where(plan.kept, plan.expert, plan.num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    token = order // choices
    rows = layouts.take_rows(x, token[None], position.reshape(1, num_tokens, choices))
    y = self._on_sorted(rows, token, expert[order], plan.num_experts, experts)
    y = layouts.take_rows(y, position[None], order[None, :, None])
    return (plan.kept_weight.reshape(num_tokens, choices, 1) * y.reshape(num_tokens, choices, -1)).sum(axis=1)

  def _run_slots(self, plan, x, experts):
    num_tokens = x.shape[1]
    shape = plan.token.shape
    expert = jnp.where(plan.filled, jnp.arange(plan.num_experts)[:, None], plan.num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    token = plan.token + plan.num_tokens * jnp.arange(shape[0])[:, None, None]
    token = jnp.where(plan.filled, token, num_tokens).reshape(-1)[order]
    y = self._on_sorted(layouts.take_or_zeros(x, token[None]), token, expert[order], plan.num_experts, experts)
    return layouts.add_rows(plan.kept_weight.reshape(-1)[order][:, None] * y, token[None], num_tokens)

  def _on_sorted(self, rows, token, expert, num_experts, experts):
    # rows <float>[1,M,D] with their tokens and experts <int32>[M], sorted by expert -> <float>[1,M,D].
    layout = layouts.Ragged(
        expert=expert, group_sizes=jnp.bincount(expert, length=num_experts),
        row_ids=layouts.row_ids(token, expert, num_experts), implementation=self.implementation)
    return experts(rows[0], layout)[None]
