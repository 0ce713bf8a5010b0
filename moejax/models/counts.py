"""Total and active parameters of a model, and FLOPs of its forward pass."""
import math
import re
from typing import Any, NamedTuple

import jax

from moejax.functional import Functional, flatten
from moejax.parallel.flops import flops
from moejax.routing.plans import Plan, TokenPlan, SlotPlan, SoftPlan
from moejax.routing.router import RouterOutput


def parameter_counts(model: Functional, batch: Any) -> dict[str, int]:
  """`total` and `active` parameters: for routed experts only the share used by the average token is active.

  `batch` consists of arrays or of `jax.ShapeDtypeStruct`s; with expert choice, the experts per token depend on its
  shape. Nothing is computed. Counts are for training, and include choices that may be dropped.
  """
  met = _experts_met(model, batch)
  total, active = 0, 0.
  for path, leaf in flatten(model.shapes()[0]).items():
    size = math.prod(leaf.shape)
    total += size
    active += size * (_share(model, met, path, leaf) if _EXPERTS.search(path) else 1)
  return dict(total=total, active=round(active))


def forward_flops(model: Functional, batch: Any) -> float:
  """Model FLOPs: matrix products of a forward pass that the model defines, independent of its implementation.

  They include all products outside of experts, such as attention, and every expert's products with its tokens; experts
  that are layers compute every token, since attention needs the tokens of other experts. The overhead of dispatchers is
  excluded: products with one-hot matrices, empty slots, padding, repeated work.
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
  share: float  # of a layer's experts that a token uses
  tokens: int
  layers: int


def _experts_met(model: Functional, batch: Any) -> dict[tuple[str, int], _Met]:
  """By stack ('', 'encoder' or 'decoder') and number of experts, which together identify a router."""
  forward = lambda params, state, batch, key: model.apply(params, state, batch, key=key, train=True).routers
  routers = jax.eval_shape(forward, *model.shapes(), batch, jax.eval_shape(lambda: jax.random.key(0)))
  keys = {depth: (depth.rpartition('block_')[0].rstrip('_'), router.plan.num_experts)
          for depth, router in routers.items()}
  return {key: _Met(experts_per_token(routers[depth]) / key[1], _tokens(routers[depth].plan),
                    list(keys.values()).count(key)) for depth, key in keys.items()}


def _share(model: Functional, met: dict, path: str, leaf: jax.ShapeDtypeStruct) -> float:
  # The active share of an expert parameter. Each choice uses one of N segments (MultiHash layers).
  axes = flatten(model.axes)[path]
  segments = leaf.shape[axes.index('segment')] if 'segment' in axes else 1
  return met[_experts_of(model, path, leaf)].share / segments


def _experts_of(model: Functional, path: str, leaf: jax.ShapeDtypeStruct) -> tuple[str, int]:
  # Stack and number of experts of an expert parameter; scanned layers have an axis before the experts'.
  stack = re.split(r'(?:^|/)(?:blocks|shared)/', path)[0]
  return stack, leaf.shape[flatten(model.axes)[path].index('expert')]


def _tokens(plan: Plan) -> int:
  groups, of_group = jax.tree.leaves(plan)[0].shape[:2]
  return groups * (plan.num_tokens if isinstance(plan, SlotPlan) else of_group)


def experts_per_token(router: RouterOutput) -> float:
  """K for token choice, E*C/S for expert choice and soft routing, E for dense routing."""
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
