"""Refuses evaluation batch sizes that would change the routing groups, and so measure another model.

Tokens of a group compete for slots, and groups are cut from the batch. So evaluators use the batch size of training and
pad the last batch. Another size gives the same metrics if every token is routed independently, or in groups of the same
size; otherwise it is refused.
"""
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.routing.plans import Plan, group_size, has_slots

Spec = Mapping[str, jax.ShapeDtypeStruct]


def check(apply: Callable, params: Tree, router_state: Tree, usual: Spec, spec: Spec, where: str) -> None:
  """Checks an evaluator with its own batch size; all arguments are shapes.

  Args:
    apply: of `functional.Functional`.
    params, router_state: of the model.
    usual: batches of the size used in training.
    spec: batches of the evaluator.
    where: config path of its batch size.

  Raises:
    ConfigError: a router would decide differently.
  """
  jaxpr, output = jax.make_jaxpr(apply, return_shape=True)(params, router_state, spec)
  sizes = [next(iter(batch.values())).shape[0] for batch in (spec, usual)]
  remedy = f'Leave it out (it is then {sizes[1]}, as in training)'
  if output.routers and _draws(jaxpr.jaxpr):
    raise ConfigError(f'{where} = {sizes[0]}: routers draw random numbers by position in the batch, so another batch '
                      f'size would change the metrics. {remedy}.')
  expected = jax.eval_shape(apply, params, router_state, usual).routers
  for layer, router in output.routers.items():
    here, there = group_size(router.plan), group_size(expected[layer].plan)
    if here != there and not _alone(router.plan):
      raise ConfigError(f'{where} = {sizes[0]}: the router of {layer} would see groups of {here} tokens, but of '
                        f"{there} in training, so these would be another model's metrics. {remedy}, or choose groups "
                        "that do not depend on the batch size, such as group='sequence' of the mixture.")


def _alone(plan: Plan) -> bool:
  """Whether no token's experts depend on the other tokens of its group."""
  return not has_slots(plan) and plan.leak == 'causal'


def _draws(jaxpr: Any) -> bool:
  return any(equation.primitive.name == 'random_bits' for equation in jaxpr.eqns) or any(
      _draws(inner) for inner in core.subjaxprs(jaxpr))
