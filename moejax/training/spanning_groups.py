"""Detects routing groups that span several devices, which must route them together, slowly."""
from typing import Any, NamedTuple

import jax

from moejax.layers.moe import tokens_per_group
from moejax.parallel import rules
from moejax.routing.plans import group_size, has_slots
from moejax.training.setup import Setup


class Spanning(NamedTuple):
  """Routing groups of a stack that do not divide evenly over the shards of the batch.

  Attributes:
    count: number of groups in a microbatch.
    tokens: tokens per group.
    dividing: the largest group size up to `tokens` that divides evenly.
  """
  count: int
  tokens: int
  dividing: int


def sides(config: Any) -> dict[str, Any]:
  """{config path: config} of the model's stacks."""
  model = config.model
  return {f'model.{side}': model[side] for side in ('encoder', 'decoder') if side in model} or {'model': model}


def spanning(setup: Setup, accumulate: int | None = None, shards: int | None = None) -> dict[str, Spanning]:
  """{config path: groups} of the stacks whose groups do not divide evenly over `shards` (by default those of `setup`).

  Without slots groups have no meaning for a dispatcher, so a group may also span several whole devices.
  """
  accumulate, shards = accumulate or setup.training.accumulate, shards or rules.batch_shards(setup.mesh)
  if shards == 1 or all(_group(side) == 'sequence' for side in sides(setup.config).values()):
    return {}
  batch = setup.pipeline.batch_spec()
  examples = next(iter(batch.values())).shape[0]
  routers = jax.eval_shape(lambda *args: setup.model.apply(*args), *setup.model.shapes(), batch).routers
  found = {}
  for path, side in sides(setup.config).items():
    prefix = path.removeprefix('model').removeprefix('.')
    plans = [router.plan for name, router in routers.items() if name.rpartition('block_')[0].rstrip('_') == prefix]
    group = _group(side)
    if not plans or group == 'sequence':
      continue
    micro, length = examples // accumulate, _tokens(plans[0]) // examples
    tokens = tokens_per_group(group, micro, length, f'config.{path}.moe.group')
    of_device = micro * length // shards
    if of_device % tokens and (has_slots(plans[0]) or tokens % of_device):
      dividing = next(n for n in range(min(tokens, of_device), 0, -1) if of_device % n == 0)
      found[path] = Spanning(micro * length // tokens, tokens, dividing)
  return found


def notice(setup: Setup) -> str | None:
  """A sentence about routers whose groups do not divide evenly over the devices, and what to set; None if all do."""
  found, shards = spanning(setup), rules.batch_shards(setup.mesh)
  if not found:
    return None
  what = ' and '.join(f'the {group.count} routing groups of {group.tokens} tokens in config.{path}'
                      for path, group in found.items())
  keys = ' '.join(f'--config.{path}.moe.group={group.dividing}' for path, group in found.items())
  return (f'Slow: {what} do not divide evenly over the {shards} shards of the batch, so devices route them together '
          f'and the compiler often communicates everything; {keys} gives every shard whole groups.')


def _group(side: Any) -> str | int:
  moe = side.get('moe')
  return moe.get('group', 'batch') if moe else 'sequence'


def _tokens(plan) -> int:
  return jax.tree.leaves(plan)[0].shape[0] * group_size(plan)
