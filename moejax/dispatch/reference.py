"""Every expert computes every token, in float32: slow, supports every plan, and is the reference for the others."""
import dataclasses

import jax.numpy as jnp

from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher
from moejax.experts.layouts import Buffers, row_ids
from moejax.routing.plans import DensePlan, SoftPlan


@DISPATCHERS('reference')
@dataclasses.dataclass(frozen=True)
class Reference(Dispatcher):
  """Weighs all E outputs of all tokens with the plan's dense form; the only dispatcher for a `DensePlan`."""

  @classmethod
  def supports(cls, plan_type, placed):
    """All plans."""
    return True

  def run(self, plan, x, experts):
    """See `Dispatcher.run`."""
    x = x.astype(jnp.float32)
    if isinstance(plan, SoftPlan):
      return self._run_soft(plan, x, experts)
    plan = plan if isinstance(plan, DensePlan) else plan.to_dense()
    groups, tokens, dim = x.shape
    rows = jnp.broadcast_to(x.reshape(1, groups * tokens, dim), (plan.num_experts, groups * tokens, dim))
    ids = row_ids(jnp.arange(groups * tokens), jnp.arange(plan.num_experts)[:, None], plan.num_experts)
    y = experts(rows, Buffers(ids)).reshape(plan.num_experts, groups, tokens, dim)
    return jnp.einsum('gse,egsd->gsd', plan.weight, y.astype(jnp.float32), precision='highest')

  def _run_soft(self, plan, x, experts):
    groups, _, num_experts, capacity = plan.dispatch.shape
    rows = jnp.einsum('gsec,gsd->egcd', plan.dispatch, x, precision='highest')
    ids = jnp.arange(num_experts * groups * capacity).reshape(num_experts, groups * capacity)
    y = experts(rows.reshape(num_experts, groups * capacity, -1), Buffers(ids)).reshape(rows.shape)
    return jnp.einsum('gsec,egcd->gsd', plan.combine, y.astype(jnp.float32), precision='highest')
