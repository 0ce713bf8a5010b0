"""How many parameters a model has, and how many of them a token meets."""
import math
import re
from typing import Any, NamedTuple

import jax

from moejax.functional import Functional, flatten
from moejax.parallel.flops import flops
from moejax.routing.plans import Plan, TokenPlan, SlotPlan, SoftPlan
from moejax.routing.router import RouterOutput


def parameter_counts(model: Functional, batch: Any) -> dict[str, int]:
  """`total` parameters, and those `active`: all but the share of routed experts that the average token does not meet.

  `batch` is one of arrays or of `jax.ShapeDtypeStruct`s: where experts choose tokens, how many experts a token meets
  depends on its shape. Nothing is computed. Experts are those met in training; choices that are dropped at run time
  count.
  """
  met = _experts_met(model, batch)
  total, active = 0, 0.
  for path, leaf in flatten(model.shapes()[0]).items():
    size = math.prod(leaf.shape)
    total += size
    active += size * (_share(model, met, path, leaf) if _EXPERTS.search(path) else 1)
  return dict(total=total, active=round(active))


def forward_flops(model: Functional, batch: Any) -> float:
  """FLOPs of the matrix products of a forward pass that the model itself asks for, whatever runs it.

  These are all products outside of experts, attention included, and those of every expert with the tokens that chose
  it; of those that are layers, all for every token, as it takes to attend to tokens of other experts.
  What a dispatcher adds is left out: products with one-hot matrices, empty slots, padding, weights met twice.
  """
  params, state = model.shapes()
  key = jax.eval_shape(lambda: jax.random.key(0))
  forward = lambda params, state, batch, key: model.apply(params, state, batch, key=key, train=True).logits
  traced = jax.make_jaxpr(forward)(params, state, batch, key).jaxpr
  outside = flops(traced, lambda scope: not re.search(r'\bdispatch\b', scope))
  met = _experts_met(model, batch)
  experts = 0.
  for path, leaf in flatten(params).items():
    if '/moe/experts/' in path:
      one = met[_experts_of(model, path, leaf)]
      uses = one.layers if _SHARED.search(path) else 1
      experts += 2 * math.prod(leaf.shape) * _share(model, met, path, leaf) * one.tokens * uses
  return outside + experts


_SHARED = re.compile(r'(?:^|/)shared/')
_EXPERTS = re.compile(r'/moe/(?:experts|layers)/')  # feed-forwards, or whole layers


class _Met(NamedTuple):
  share: float  # of a layer's experts, that a token meets
  tokens: int
  layers: int


def _experts_met(model: Functional, batch: Any) -> dict[tuple[str, int], _Met]:
  """For each stack ('', 'encoder' or 'decoder') and number of experts, which together say what router it is."""
  forward = lambda params, state, batch, key: model.apply(params, state, batch, key=key, train=True).routers
  routers = jax.eval_shape(forward, *model.shapes(), batch, jax.eval_shape(lambda: jax.random.key(0)))
  keys = {depth: (depth.rpartition('block_')[0].rstrip('_'), router.plan.num_experts)
          for depth, router in routers.items()}
  return {key: _Met(experts_per_token(routers[depth]) / key[1], _tokens(routers[depth].plan),
                    list(keys.values()).count(key)) for depth, key in keys.items()}


def _share(model: Functional, met: dict, path: str, leaf: jax.ShapeDtypeStruct) -> float:
  # Of a parameter of experts, that a token meets. Of N segments each choice passes one (MultiHash layers).
  axes = flatten(model.axes)[path]
  segments = leaf.shape[axes.index('segment')] if 'segment' in axes else 1
  return met[_experts_of(model, path, leaf)].share / segments


def _experts_of(model: Functional, path: str, leaf: jax.ShapeDtypeStruct) -> tuple[str, int]:
  # Stack and number of experts that a parameter of experts belongs to; scanned layers lie on an axis before that.
  stack = re.split(r'(?:^|/)(?:blocks|shared)/', path)[0]
  return stack, leaf.shape[flatten(model.axes)[path].index('expert')]


def _tokens(plan: Plan) -> int:
  groups, of_group = jax.tree.leaves(plan)[0].shape[:2]
  return groups * (plan.num_tokens if isinstance(plan, SlotPlan) else of_group)


def experts_per_token(router: RouterOutput) -> float:
  """K where tokens choose, E*C/S where slots do, E where every expert sees every token."""
  plan = router.plan
  if router.k is not None:
    return router.k
  if isinstance(plan, TokenPlan):
    return plan.expert.shape[-1]
  if isinstance(plan, SlotPlan):
    return plan.num_experts * plan.capacity / plan.num_tokens
  if isinstance(plan, SoftPlan):
    return math.prod(plan.dispatch.shape[2:]) / plan.dispatch.shape[1]
  return plan.num_experts
