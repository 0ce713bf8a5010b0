"""Total and active parameters of a model, and FLOPs of its forward pass."""
import math
import re
from typing import Any, NamedTuple

import jax

from moejax.functional import Functional, expert_paths, flatten
from moejax.models.mixtures import stack_depth_and_branch
from moejax.parallel.flops import flops
from moejax.routing.plans import Plan, TokenPlan, SlotPlan, SoftPlan
from moejax.routing.router import RouterOutput


class Parameters(NamedTuple):
  """Parameters of a part of a model.

  Attributes:
    total: number of all.
    active: number of those used by the average token: of routed experts, the share of its experts.
  """
  total: int
  active: float


def parameter_counts(model: Functional, batch: Any) -> dict[str, int]:
  """`total` and `active` parameters; see `parameters_by_part`."""
  parts = parameters_by_part(model, batch).values()
  return dict(total=sum(part.total for part in parts), active=round(sum(part.active for part in parts)))


def parameters_by_part(model: Functional, batch: Any) -> dict[str, Parameters]:
  """`{part: Parameters}`: routed experts, routers, and all others by the first name of their path.

  `batch` consists of arrays or of `jax.ShapeDtypeStruct`s; with expert choice, the experts per token depend on its
  shape. Nothing is computed. Counts are for training, and include choices that may be dropped.
  """
  met, experts = _experts_met(model, batch), expert_paths(model.axes)
  parts: dict[str, Parameters] = {}
  for path, leaf in flatten(model.shapes()[0]).items():
    names, size = path.split('/'), math.prod(leaf.shape)
    part = 'experts' if path in experts else 'routers' if 'router' in names else names[0]
    active = size * _share(model, met, path, leaf) if path in experts else size
    before = parts.get(part, Parameters(0, 0))
    parts[part] = Parameters(before.total + size, before.active + active)
  return parts


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
  met, paths = _experts_met(model, batch), expert_paths(model.axes)
  experts = 0.
  for path, leaf in flatten(params).items():
    if path in paths and _WHOLE_LAYERS not in path:
      one = _of_path(model, met, path, leaf)
      uses = one.layers if _SHARED.search(path) else 1
      experts += 2 * math.prod(leaf.shape) * _share(model, met, path, leaf) * one.tokens * uses
  return outside + experts


_SHARED = re.compile(r'(?:^|/)shared/')
_WHOLE_LAYERS = '/moe/layers/'  # experts that are layers


class _Met(NamedTuple):
  share: float  # of a layer's experts that a token uses
  tokens: int
  layers: int


def _experts_met(model: Functional, batch: Any) -> dict[tuple[str, str, int], _Met]:
  """By stack ('', 'encoder' or 'decoder'), branch ('' where blocks have a single router) and number of experts."""
  forward = lambda params, state, batch, key: model.apply(params, state, batch, key=key, train=True).routers
  routers = jax.eval_shape(forward, *model.shapes(), batch, jax.eval_shape(lambda: jax.random.key(0)))
  keys = {}
  for name, router in routers.items():
    stack, _, branch = stack_depth_and_branch(name)
    keys[name] = stack, branch, router.plan.num_experts
  return {key: _Met(experts_per_token(routers[name]) / key[2], _tokens(routers[name].plan),
                    list(keys.values()).count(key)) for name, key in keys.items()}


def _share(model: Functional, met: dict, path: str, leaf: jax.ShapeDtypeStruct) -> float:
  # The active share of an expert parameter. Each choice uses one of N segments (MultiHash layers).
  axes = flatten(model.axes)[path]
  segments = leaf.shape[axes.index('segment')] if 'segment' in axes else 1
  return _of_path(model, met, path, leaf).share / segments


def _of_path(model: Functional, met: dict, path: str, leaf: jax.ShapeDtypeStruct) -> _Met:
  # What a token uses of the experts that an expert parameter belongs to; scanned layers have an axis before the experts'.
  stack, _, within = re.split(r'(?:^|/)(blocks|shared)/', path, maxsplit=1)
  branch = next(name for name in within.split('/') if not name.isdigit())
  experts = leaf.shape[flatten(model.axes)[path].index('expert')]
  return met.get((stack, branch, experts)) or met[stack, '', experts]


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
