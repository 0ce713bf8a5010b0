"""Detects routing groups that span several devices, which must route them together, slowly."""
from typing import Any, NamedTuple

import jax

from moejax.layers.feed_forwards.moe import tokens_per_group
from moejax.models.mixtures import mixture_of, mixtures_of
from moejax.parallel import rules
from moejax.routing.plans import group_size, has_slots
from moejax.training.setup import Setup


class Spanning(NamedTuple):
  """Routing groups of a mixture that do not divide evenly over the shards of the batch.

  Attributes:
    count: number of groups in a microbatch.
    tokens: tokens per group.
    dividing: the largest group size up to `tokens` that divides evenly.
    group: the size in the config.
  """
  count: int
  tokens: int
  dividing: int
  group: int | str


def sides(config: Any) -> dict[str, Any]:
  """{config path: config} of the model's stacks."""
  model = config.model
  return {f'model.{side}': model[side] for side in ('encoder', 'decoder') if side in model} or {'model': model}


def spanning(setup: Setup, accumulate: int | None = None, shards: int | None = None) -> dict[str, Spanning]:
  """{path of a mixture in the config: groups} for groups that do not divide evenly over `shards` (those of `setup`).

  Without slots groups have no meaning for a dispatcher, so a group may also span several whole devices.
  """
  accumulate, shards = accumulate or setup.training.accumulate, shards or rules.batch_shards(setup.mesh)
  if shards == 1 or all(_group(mixture) == 'sequence' for mixture in mixtures_of(setup.config.model)):
    return {}  # without tracing the model
  batch = setup.pipeline.batch_spec()
  examples = next(iter(batch.values())).shape[0]
  routers = jax.eval_shape(lambda *args: setup.model.apply(*args), *setup.model.shapes(), batch).routers
  plans, groups = {}, {}
  for name, router in routers.items():
    path, mixture = mixture_of(setup.config.model, name)
    plans[path], groups[path] = router.plan, _group(mixture)
  found = {}
  for path, plan in plans.items():
    if groups[path] == 'sequence':
      continue
    micro, length = examples // accumulate, _tokens(plan) // examples
    tokens = tokens_per_group(groups[path], micro, length, f'{path}.group')
    of_device = micro * length // shards
    if of_device % tokens and (has_slots(plan) or tokens % of_device):
      dividing = next(n for n in range(min(tokens, of_device), 0, -1) if of_device % n == 0)
      found[path.removeprefix('config.')] = Spanning(micro * length // tokens, tokens, dividing, groups[path])
  return found


def notice(setup: Setup) -> str | None:
  """A sentence about routers whose groups do not divide evenly over the devices, and what to set; None if all do."""
  found, shards = spanning(setup), rules.batch_shards(setup.mesh)
  if not found:
    return None
  what = ' and '.join(f'the {group.count} routing groups of {group.tokens} tokens in config.{path}'
                      for path, group in found.items())
  keys = ' '.join(f'--config.{path}.group={group.dividing}' for path, group in found.items())
  return (f'Slow: {what} do not divide evenly over the {shards} shards of the batch, so devices route them together '
          f'and the compiler often communicates everything; {keys} gives every shard whole groups.')


def _group(mixture: Any) -> int | str:
  return mixture.get('group', 'batch')


def _tokens(plan) -> int:
  return jax.tree.leaves(plan)[0].shape[0] * group_size(plan)
