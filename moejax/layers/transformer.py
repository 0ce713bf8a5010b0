"""A stack of blocks and a final norm, the common part of all models."""
import functools
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import ConfigError
from moejax.functional import Tree, add_updates
from moejax.layers import placement
from moejax.layers.block_mixture import BlockMixture
from moejax.layers.blocks import Block, Context, Norms, SparseForm
from moejax.layers.norms import NORMS
from moejax.layers.stack import Depth, Layers, Remat, Stack
from moejax.ranges import Rate
from moejax.routing.router import RouterOutput


# Parameters shared by all layers. 'all': one block, used at every depth (ALBERT, 1909.11942); 'all_but_norms': one
# attention, one router and one set of experts, but each layer has its own norms, so a token may be routed to different
# experts at different depths (WideNet, 2107.11817).
Sharing = Literal['none', 'all', 'all_but_norms']

# Tracing a block for training takes a tenth of a second, and compiling it a few seconds.
_MOST_TRACED = 100


class Transformer(nnx.Module):
  """`num_layers` pre-norm blocks, dense or sparse, and a final norm.

  Config keys:
    num_layers: L.
    attention: for every block; see `Attention`.
    feed_forward: for dense blocks; see `FeedForward`.
    moe: for sparse blocks; see `MoE`. May be None if no layer is sparse. Its `num_experts` may be a list with one int
      for each sparse layer.
    sparse: which layers are sparse; see `placement`.
    extra_feed_forward: one more dense branch after each mixture of experts (ST-MoE), or None.
    sparse_form: a mixture of experts replaces the feed-forward of its block, is inserted after it (BASE layers), or
      mixes whole layers (`LayerMixture`).
    norm: for every branch and at the end; see `norms`.
    dropout: on every branch.
    stochastic_depth: drop rate of the branches of the last block; linear in depth from 0 at the first.
    sharing: the parameters shared by all layers; see `Sharing`. The state of a shared router is updated once per step,
      from the tokens of all layers.
    layers: scanned (only distinct blocks are compiled) or unrolled.
    remat: the residuals of each block saved for the backward pass.
  """

  def __init__(self, *, where: str, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, num_layers: Depth, attention: Mapping,
               feed_forward: Mapping, norm: Mapping, moe: Mapping | None = None,
               sparse: Mapping = dict(name='none'), extra_feed_forward: Mapping | None = None,
               sparse_form: SparseForm = 'replace', dropout: Rate = 0., stochastic_depth: Rate = 0.,
               layers: Layers = 'unrolled', remat: Remat = 'none', sharing: Sharing = 'none',
               cross_attention: bool = False):
    kinds, mixtures = placement.mixtures(moe, f'{where}.moe', placement.kinds(sparse, f'{where}.sparse', num_layers))
    if sharing != 'none' and len(set(kinds)) > 1:
      raise ConfigError(f'{where}.sharing = {sharing!r} needs layers of one kind, but {where}.sparse and {where}.moe '
                        f"make {' and '.join(sorted(set(kinds)))} ones. Make all or no layers sparse, or use 'none'.")
    if moe is None and 'sparse' in kinds:
      raise ConfigError(f'{where}.moe is missing: {where}.sparse makes some layers sparse. Set moe, or sparse=none.')
    if sparse_form == 'layer' and (sharing == 'all_but_norms' or extra_feed_forward is not None):
      key, why = (('sharing', "each expert is a layer with its own norms. Use 'all' or 'none'")
                  if extra_feed_forward is None else
                  ('extra_feed_forward', 'there is no mixture branch to add it after. Remove it'))
      raise ConfigError(f"{where}.{key}: with sparse_form='layer' {why}.")
    self.stack, self.sharing = Stack(kinds, layers, remat), sharing
    if self.stack.traced > _MOST_TRACED:
      raise ConfigError(f'{where}.num_layers = {num_layers} makes {self.stack.traced} blocks to trace and compile '
                        f"separately, more than the maximum of {_MOST_TRACED}. Use layers='scan' and a periodic "
                        f'{where}.sparse, or fewer layers.')

    def block(kind: str, rngs: nnx.Rngs) -> Block | BlockMixture:
      if kind != 'dense' and sparse_form == 'layer':
        return BlockMixture(mixtures[kind], where, dim=dim, rngs=rngs, block=functools.partial(block, 'dense'))
      return Block('dense' if kind == 'dense' else 'sparse', where=where, dim=dim, num_layers=num_layers, dtype=dtype,
                   rngs=rngs, attention=attention, feed_forward=feed_forward, moe=mixtures.get(kind), norm=norm,
                   extra_feed_forward=extra_feed_forward, sparse_form=sparse_form, dropout=dropout,
                   stochastic_depth=stochastic_depth, cross_attention=cross_attention)

    def own(kind: str, rngs: nnx.Rngs) -> nnx.Module:
      match sharing:
        case 'none':
          return block(kind, rngs)
        case 'all':
          return nnx.Module()
        case 'all_but_norms':
          return Norms(block(kind, rngs))

    self.blocks = self.stack.build(own, rngs)
    self.shared = None if sharing == 'none' else block(kinds[0], rngs)
    if sharing == 'all_but_norms':
      Norms(self.shared)  # removes them from the shared block
    self.final_norm = NORMS.build(norm, f'{where}.norm', dim=dim, axis='norm', rngs=rngs)

  def transform(self, x: jax.Array, context: Context, *, key: jax.Array | None,
                train: bool) -> tuple[jax.Array, dict[str, RouterOutput], Tree]:
    """x: <float>[B,S,D] -> (the same shape, router outputs by depth, updates of router state)."""
    def step(own, x, key, depth):
      norms = own if self.sharing == 'all_but_norms' else None
      block = own if self.sharing == 'none' else self.shared
      return block(x, context, key=key, depth=depth, train=train, norms=norms)

    x, routers, updates = self.stack.run(self.blocks, step, x, key)
    if updates and self.sharing != 'none':
      by_layer = self.stack.unrolled(updates) if self.stack.layers == 'scan' else updates
      return self.final_norm(x), routers, dict(shared=functools.reduce(add_updates, by_layer.values()))
    return self.final_norm(x), routers, dict(blocks=updates) if updates else {}

  def distinct_blocks(self) -> Iterator[Block | BlockMixture]:
    """Blocks for reading their static attributes; one for all layers that are scanned together or share it."""
    yield from self.stack.distinct(self.blocks) if self.shared is None else [self.shared]
