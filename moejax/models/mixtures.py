"""Which part of a model's config belongs to a router."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import at, call
from moejax.layers import kinds
from moejax.layers.kinds import TransformerConfig

_KEYS = {field.name for field in dataclasses.fields(TransformerConfig)}


def stack_depth_and_branch(router: str) -> tuple[str, int, str]:
  """('encoder', 3, 'moe') of 'encoder_block_03/moe'; ('', 3, '') of 'block_03', the only router of its block."""
  block, _, branch = router.partition('/')
  stack, _, depth = block.rpartition('block_')
  return stack.rstrip('_'), int(depth), branch


def mixtures_of(model: Mapping) -> list[Any]:
  """The configs of all mixtures of experts in `model`, config.model."""
  stacks = [model[side] for side in ('encoder', 'decoder') if side in model] or [model]
  named = [branch for stack in stacks for kind in (stack.get('blocks') or {}).values() for branch in kind.values()]
  return [*(stack['moe'] for stack in stacks if stack.get('moe')), *(branch for branch in named if 'router' in branch)]


def mixture_of(model: Mapping, router: str) -> tuple[str, Any]:
  """(config path, config) of the mixture of experts with this router, named as in `ModelOutput.routers`.

  `model`: config.model.
  """
  stack, depth, branch = stack_depth_and_branch(router)
  config, where = (model[stack], f'config.model.{stack}') if stack else (model, 'config.model')
  if not config.get('blocks'):
    return f'{where}.moe', config.get('moe')
  with at(where):
    names, contents = kinds.expand(call(TransformerConfig, {
        'norm': {}, **{key: value for key, value in config.items() if key in _KEYS}}, ''))
  kind = contents[names[depth]]
  spec = kind[branch] if branch else next(spec for spec in kind.values() if 'router' in spec.config)
  return spec.where, spec.config
