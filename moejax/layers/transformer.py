"""A stack of blocks and a final norm, the trunk of all models but the recurrent one."""
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import ConfigError, at, config_path
from moejax.functional import Tree, add_updates
from moejax.layers.block import Block, Norms
from moejax.layers.block_mixture import BlockMixture
from moejax.layers.kinds import TransformerConfig, expand
from moejax.layers.norms import NORMS
from moejax.layers.stack import Stack
from moejax.layers.sublayer import Context
from moejax.layers.views import VIEWS
from moejax.parallel import rules
from moejax.random import derive
from moejax.random import dropout as drop
from moejax.routing.router import RouterOutput

# Tracing a block for training takes a tenth of a second, and compiling it a few seconds.
_MOST_TRACED = 100


@dataclasses.dataclass(frozen=True)
class Encoded:
  """What a `Transformer` returns.

  Attributes:
    x: <float>[B,S,D].
    routers: the output of each router, by depth ('block_03'), and by branch where a block has several.
    updates: updates of router state, by the paths of its variables.
    cache: what the blocks remember; None if they were given no cache.
  """
  x: Float[Array, 'B S D']
  routers: dict[str, RouterOutput]
  updates: Tree
  cache: Tree | None = None


class Transformer(nnx.Module):
  """`num_layers` blocks and a final norm.

  As the trunk of a model it is the attribute `transformer`, which the paths of parameters leave out.

  Args:
    config: see `TransformerConfig`.
    cross_attention: whether blocks of the shorthand attend to a memory.

  Attributes:
    heads: H of the first attention; None without any.
  """

  def __init__(self, config: TransformerConfig, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs,
               cross_attention: bool = False):
    where = config_path()
    kinds, contents = expand(config, cross_attention)
    if config.sharing != 'none' and len(set(kinds)) > 1:
      raise ConfigError(f".sharing = {config.sharing!r} needs layers of one kind, and there are "
                        f"{' and '.join(sorted(set(kinds)))} ones. Make all or no layers sparse, or use 'none'.")
    self.stack, self.sharing, self.dropout = Stack(kinds, config.stacking, config.remat), config.sharing, config.dropout
    if self.stack.traced > _MOST_TRACED:
      raise ConfigError(f'.num_layers = {config.num_layers} makes {self.stack.traced} blocks to trace and '
                        f"compile separately, more than the maximum of {_MOST_TRACED}. Use stacking='scan' and a "
                        'periodic pattern of layers, or fewer layers.')

    def of_branches(kind: str, rngs: nnx.Rngs) -> Block:
      with at(where):  # a block that is an expert is built inside of another group
        return Block(contents[kind], dim=dim, dtype=dtype, rngs=rngs, norm=config.norm, dropout=config.dropout,
                     drop_step=config.stochastic_depth / max(config.num_layers - 1, 1))

    def block(kind: str, rngs: nnx.Rngs) -> Block | BlockMixture:
      if kind != 'dense' and config.sparse_form == 'layer':
        return BlockMixture(contents[kind]['moe'], dim=dim, rngs=rngs, block=functools.partial(of_branches, 'dense'))
      return of_branches(kind, rngs)

    def own(kind: str, rngs: nnx.Rngs) -> nnx.Module:
      match config.sharing:
        case 'none':
          return block(kind, rngs)
        case 'all':
          return nnx.Module()
        case 'all_but_norms':
          return Norms(of_branches(kind, rngs))

    self.heads = next((branch.config['heads'] for kind in contents.values() for branch in kind.values()
                       if 'heads' in branch.config), None)
    self.blocks = self.stack.build(own, rngs)
    self.shared = None if config.sharing == 'none' else block(kinds[0], rngs)
    if isinstance(self.shared, Block) and config.sharing == 'all_but_norms':
      self.shared.remove_norms()
    if config.view is not None and config.sharing != 'none':
      raise ConfigError(f".view: layers with sharing = {config.sharing!r} have no weights of their own to view. Use "
                        "sharing='none'.")
    view = config.view
    self.views = None if view is None else self.stack.build(
        lambda kind, rngs: VIEWS.build(view, f'{where}.view', block=block(kind, rngs), rngs=rngs), rngs)
    self.final_norm = NORMS.build(config.norm, '.norm', dim=dim, axis='norm', rngs=rngs)

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: Tree | None = None, *, key: jax.Array | None,
               train: bool) -> Encoded:
    """x: <float>[B,S,D] embeddings; `cache`: of its blocks, for tokens that follow others."""
    x = drop(x, self.dropout, key=derive(key, 'embedding'), train=train)
    x = rules.constrain(x, ('batch', 'sequence', 'embed'))

    def step(own: Any, x, key, depth, cache):
      norms = own if self.sharing == 'all_but_norms' else None
      block = own if self.shared is None else self.shared
      return block(x, context, cache, key=key, depth=depth, train=train, norms=norms)

    x, routers, updates, cache = self.stack.run(self.blocks, step, x, derive(key, 'blocks'), cache, self.views)
    if updates and self.sharing != 'none':
      by_layer = self.stack.unrolled(updates) if self.stack.stacking == 'scan' else updates
      updates = dict(shared=functools.reduce(add_updates, by_layer.values()))
    elif updates:
      updates = dict(blocks=updates)
    return Encoded(self.final_norm(x), routers, updates, cache)

  def init_cache(self, batch: int, length: int, memory_length: int = 0) -> Tree:
    """What all blocks remember of B rows of at most `length` tokens, and of a memory, before the first; by the paths of
    blocks."""
    return self.stack.caches(lambda kind: self._of_kind(kind).init_cache(batch, length, memory_length))

  def cache_axes(self) -> Tree:
    """Logical names of the axes of `init_cache`."""
    return self.stack.cache_axes(lambda kind: self._of_kind(kind).cache_axes())

  def _of_kind(self, kind: str) -> Any:
    return next(block for block, other in zip(self.distinct_blocks(), self.stack.traced_kinds) if other == kind)

  def distinct_blocks(self) -> Iterator[Any]:
    """Blocks for reading their static attributes; one for all layers that are scanned together or share it."""
    yield from self.stack.distinct(self.blocks) if self.shared is None else [self.shared]
