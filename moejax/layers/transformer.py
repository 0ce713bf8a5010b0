"""A stack of blocks and the norm after it: what is common to all models."""
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


# What layers share. 'all': one block, used at every depth (ALBERT, 1909.11942); 'all_but_norms': one attention, one
# router and one set of experts, but norms of its own in every layer, by which a token may meet other experts at another
# depth (WideNet, 2107.11817).
Sharing = Literal['none', 'all', 'all_but_norms']

# A block takes a tenth of a second to trace for training, and some seconds to compile.
_MOST_TRACED = 100


class Transformer(nnx.Module):
  """`num_layers` pre-norm blocks, dense or sparse, and a final norm.

  Config keys:
    num_layers: L.
    attention: of every block; see `Attention`.
    feed_forward: of dense blocks; see `FeedForward`.
    moe: of sparse blocks; see `MoE`. May be None where no layer is sparse. Its `num_experts` may be a list, one for
      each sparse layer.
    sparse: which layers are sparse; see `placement`.
    extra_feed_forward: of one more dense branch after each mixture of experts (ST-MoE), or None.
    sparse_form: a mixture of experts replaces the feed-forward of its block, is inserted after it (BASE layers), or is
      of whole layers (`LayerMixture`).
    norm: of every branch and at the end; see `norms`.
    dropout: on every branch.
    stochastic_depth: rate at which branches of the last block are dropped; linear in depth from 0 at the first.
    sharing: which parameters all layers share; see `Sharing`. The state of a shared router moves once a step, by what
      the tokens of all layers did.
    layers: scanned (only distinct blocks are compiled) or unrolled.
    remat: what of each block is kept for the backward pass.
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
                        f'make {" and ".join(sorted(set(kinds)))} ones. Make all sparse or none, or share nothing.')
    if moe is None and 'sparse' in kinds:
      raise ConfigError(f'{where}.moe is missing: {where}.sparse makes some layers sparse. Set moe, or sparse=none.')
    if sparse_form == 'layer' and (sharing == 'all_but_norms' or extra_feed_forward is not None):
      key, why = (('sharing', "the norms of a layer that is an expert are the expert's own. Use 'all', or 'none'")
                  if extra_feed_forward is None else
                  ('extra_feed_forward', 'there is no branch of a mixture to follow. Remove it'))
      raise ConfigError(f"{where}.{key}: with sparse_form='layer' {why}.")
    self.stack, self.sharing = Stack(kinds, layers, remat), sharing
    if self.stack.traced > _MOST_TRACED:
      raise ConfigError(f'{where}.num_layers = {num_layers} makes {self.stack.traced} blocks that are traced and compiled '
                        f"one by one, and at most {_MOST_TRACED} can be. Use layers='scan', and a {where}.sparse that "
                        'repeats; or fewer layers.')

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
      Norms(self.shared)  # takes them out
    self.final_norm = NORMS.build(norm, f'{where}.norm', dim=dim, axis='norm', rngs=rngs)

  def transform(self, x: jax.Array, context: Context, *, key: jax.Array | None,
                train: bool) -> tuple[jax.Array, dict[str, RouterOutput], Tree]:
    """x: <float>[B,S,D] -> (the same, router outputs by depth, router state that changes)."""
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
    """Blocks for reading what is static in them; one for all layers that are scanned together, or share it."""
    yield from self.stack.distinct(self.blocks) if self.shared is None else [self.shared]
