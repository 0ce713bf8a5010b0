"""How many parameters a model has, and how many of them a token meets."""
import math
from typing import Any

import jax

from moejax.functional import Functional, flatten
from moejax.routing.plans import Plan, TokenPlan, SlotPlan, SoftPlan


def parameter_counts(model: Functional, batch: Any) -> dict[str, int]:
  """`total` parameters, and those `active`: all but the share of routed experts that the average token does not meet.

  `batch` is one of arrays or of `jax.ShapeDtypeStruct`s: where experts choose tokens, how many experts a token meets
  depends on its shape. Nothing is computed. Choices that are dropped at run time count as met.
  """
  params, state = model.shapes()
  routers = jax.eval_shape(lambda *args: model.apply(*args), params, state, batch).routers
  # All sparse layers of one stack ('', 'encoder' or 'decoder') have the same experts and the same kind of router.
  met = {depth.rpartition('block_')[0].rstrip('_'): experts_per_token(router.plan) / router.plan.num_experts
         for depth, router in routers.items()}
  total, active = 0, 0.
  for path, leaf in flatten(params).items():
    size = math.prod(leaf.shape)
    stack = path.partition('blocks/')[0].rstrip('/')
    total += size
    active += size * (met[stack] if '/moe/experts/' in path else 1)
  return dict(total=total, active=round(active))


def experts_per_token(plan: Plan) -> float:
  """K where tokens choose, E*C/S where slots do, E where every expert sees every token."""
  if isinstance(plan, TokenPlan):
    return plan.expert.shape[-1]
  if isinstance(plan, SlotPlan):
    return plan.num_experts * plan.capacity / plan.num_tokens
  if isinstance(plan, SoftPlan):
    return math.prod(plan.dispatch.shape[2:]) / plan.dispatch.shape[1]
  return plan.num_experts
