"""A stack of blocks and a final norm, the trunk of all models but the recurrent one."""
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ConfigError, at, path
from moejax.functional import Tree, add_updates
from moejax.layers import pattern as patterns
from moejax.layers.block import Block, BranchSpec, Norms
from moejax.layers.block_mixture import BlockMixture
from moejax.layers.dropout import dropout as drop
from moejax.layers.norms import NORMS
from moejax.layers.stack import Depth, Layers, Remat, Stack, factor
from moejax.layers.sublayer import Context
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import Rate
from moejax.routing.router import RouterOutput

# The mixture of a sparse block replaces the dense feed-forward, is inserted after it, or replaces the whole block, with
# blocks as experts (`block_mixture`).
SparseForm = Literal['replace', 'insert', 'layer']

# Parameters shared by all layers. 'all': one block, used at every depth (ALBERT, 1909.11942); 'all_but_norms': one
# attention, one router and one set of experts, but each layer has its own norms, so a token may be routed to different
# experts at different depths (WideNet, 2107.11817).
Sharing = Literal['none', 'all', 'all_but_norms']

# Tracing a block for training takes a tenth of a second, and compiling it a few seconds.
_MOST_TRACED = 100


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The keys of a `Transformer`, which its model's config holds.

  Attributes:
    num_layers: L.
    norm: for every branch and at the end; see `norms`.
    attention: for every block; see `Attention`. Needed without `blocks`, as is `feed_forward`.
    feed_forward: for dense blocks; see `FeedForward`.
    moe: for sparse blocks; see `MoE`. May be None if no layer is sparse. Its `num_experts` may be a list with one int
      for each sparse layer.
    sparse: which layers are sparse; see `pattern`. None: no layer.
    extra_feed_forward: one more dense branch after each mixture of experts (ST-MoE), or None.
    sparse_form: a mixture of experts replaces the feed-forward of its block, is inserted after it (BASE layers), or
      mixes whole layers (`LayerMixture`).
    blocks: kinds of blocks by name, each with its branches by name, in order, in place of the keys above; see `pattern`.
    pattern: the kind of each layer; may be None if there is only one.
    dropout: on every branch, and on the input.
    stochastic_depth: drop rate of the branches of the last block; linear in depth from 0 at the first.
    layers: scanned (only distinct blocks are compiled) or unrolled.
    remat: the residuals of each block saved for the backward pass.
    sharing: the parameters shared by all layers; see `Sharing`. The state of a shared router is updated once per step,
      from the tokens of all layers.
  """
  num_layers: Depth
  norm: Mapping
  attention: Mapping | None = None
  feed_forward: Mapping | None = None
  moe: Mapping | None = None
  sparse: Mapping | None = None
  extra_feed_forward: Mapping | None = None
  sparse_form: SparseForm = 'replace'
  blocks: Mapping | None = None
  pattern: Mapping | None = None
  dropout: Rate = 0.
  stochastic_depth: Rate = 0.
  layers: Layers = 'unrolled'
  remat: Remat = 'none'
  sharing: Sharing = 'none'


@dataclasses.dataclass(frozen=True)
class Encoded:
  """What a `Transformer` returns.

  Attributes:
    x: <float>[B,S,D].
    routers: the output of each router, by depth ('block_03'), and by branch where a block has several.
    updates: updates of router state, by the paths of its variables.
    cache: what the blocks remember; None if they were given no cache.
  """
  x: jax.Array
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
    where = path()
    kinds, contents = _kinds(config, cross_attention)
    if config.sharing != 'none' and len(set(kinds)) > 1:
      raise ConfigError(f".sharing = {config.sharing!r} needs layers of one kind, and there are "
                        f"{' and '.join(sorted(set(kinds)))} ones. Make all or no layers sparse, or use 'none'.")
    self.stack, self.sharing, self.dropout = Stack(kinds, config.layers, config.remat), config.sharing, config.dropout
    if self.stack.traced > _MOST_TRACED:
      raise ConfigError(f'.num_layers = {config.num_layers} makes {self.stack.traced} blocks to trace and '
                        f"compile separately, more than the maximum of {_MOST_TRACED}. Use layers='scan' and a periodic "
                        'pattern of layers, or fewer layers.')

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
    self.final_norm = NORMS.build(config.norm, '.norm', dim=dim, axis='norm', rngs=rngs)

  def __call__(self, x: jax.Array, context: Context, cache: Tree | None = None, *, key: jax.Array | None,
               train: bool) -> Encoded:
    """x: <float>[B,S,D] embeddings; `cache`: of its blocks, for tokens that follow others."""
    x = drop(x, self.dropout, key=derive(key, 'embedding'), train=train)
    x = rules.constrain(x, ('batch', 'sequence', 'embed'))

    def step(own: Any, x, key, depth, cache):
      norms = own if self.sharing == 'all_but_norms' else None
      block = own if self.shared is None else self.shared
      return block(x, context, cache, key=key, depth=depth, train=train, norms=norms)

    x, routers, updates, cache = self.stack.run(self.blocks, step, x, derive(key, 'blocks'), cache)
    if updates and self.sharing != 'none':
      by_layer = self.stack.unrolled(updates) if self.stack.layers == 'scan' else updates
      updates = dict(shared=functools.reduce(add_updates, by_layer.values()))
    elif updates:
      updates = dict(blocks=updates)
    return Encoded(self.final_norm(x), routers, updates, cache)

  def init_cache(self, batch: int, length: int) -> Tree:
    """What all blocks remember of B rows of at most `length` tokens, before the first; by the paths of blocks."""
    return self.stack.caches(lambda kind: self._of_kind(kind).init_cache(batch, length))

  def cache_axes(self) -> Tree:
    """Logical names of the axes of `init_cache`."""
    return self.stack.cache_axes(lambda kind: self._of_kind(kind).cache_axes())

  def _of_kind(self, kind: str) -> Any:
    kinds = self.stack.kinds if self.stack.layers != 'scan' else [kind for unit, _ in factor(self.stack.kinds)
                                                                  for kind in unit]
    return next(block for block, other in zip(self.distinct_blocks(), kinds) if other == kind)

  def distinct_blocks(self) -> Iterator[Any]:
    """Blocks for reading their static attributes; one for all layers that are scanned together or share it."""
    yield from self.stack.distinct(self.blocks) if self.shared is None else [self.shared]


def _kinds(config: TransformerConfig, cross_attention: bool) -> tuple[tuple[str, ...], dict[str, patterns.Kind]]:
  """The kind of each layer, and the branches of each kind."""
  if config.blocks is None:
    return _dense_and_sparse(config, cross_attention)
  shorthand = [name for name in ('attention', 'feed_forward', 'moe', 'extra_feed_forward')
               if getattr(config, name) is not None]
  if shorthand:
    raise ConfigError(f'.{shorthand[0]}: {path()}.blocks says what each kind of block is made of. Remove '
                      f'{", ".join(shorthand)}.')
  return patterns.named_kinds(config.blocks, config.pattern, config.num_layers)


def _dense_and_sparse(config: TransformerConfig, cross_attention: bool) -> tuple[tuple[str, ...], dict[str, patterns.Kind]]:
  """The shorthand: attention (then cross-attention), then a feed-forward or a mixture of experts."""
  if config.attention is None or config.feed_forward is None:
    missing = 'attention' if config.attention is None else 'feed_forward'
    raise ConfigError(f'.{missing} is missing: a Transformer needs attention and feed_forward, or blocks.')
  kinds, mixtures = patterns.mixtures(
      config.moe, patterns.dense_or_sparse(config.sparse or dict(name='none'), config.num_layers))
  if config.moe is None and 'sparse' in kinds:
    raise ConfigError(f'.moe is missing: {path()}.sparse makes some layers sparse. Set moe, or sparse=none.')
  if config.sparse_form == 'layer' and (config.sharing == 'all_but_norms' or config.extra_feed_forward is not None):
    key, why = (('sharing', "each expert is a layer with its own norms. Use 'all' or 'none'")
                if config.extra_feed_forward is None else
                ('extra_feed_forward', 'there is no mixture branch to add it after. Remove it'))
    raise ConfigError(f".{key}: with sparse_form='layer' {why}.")

  def branch(key: str, name: str, keys: Mapping, norm: str = '') -> BranchSpec:
    return BranchSpec({'name': name, **keys}, f'{path()}.{key}', norm)

  mixed = dict(attention=branch('attention', 'attention', config.attention))
  if cross_attention:
    mixed['cross_attention'] = BranchSpec({**config.attention, 'name': 'cross_attention'}, f'{path()}.attention')
  dense = dict(feed_forward=branch('feed_forward', 'feed_forward', config.feed_forward))
  contents = {'dense': {**mixed, **dense}}
  for kind, moe in mixtures.items():
    if config.sparse_form == 'insert':  # without a norm: experts have their own
      contents[kind] = {**mixed, **dense, 'moe': branch('moe', 'moe', {'pre_norm': None, **moe})}
    else:  # takes the norm of the feed-forward that it replaces, so that a dense model's parameters fit it
      contents[kind] = {**mixed, 'moe': branch('moe', 'moe', moe, norm='feed_forward_norm')}
    if config.extra_feed_forward is not None:
      contents[kind]['extra_feed_forward'] = branch('extra_feed_forward', 'feed_forward', config.extra_feed_forward,
                                                    norm='extra_norm')
  return kinds, contents
