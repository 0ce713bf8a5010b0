"""A stack of blocks and the norm after it: what is common to all models."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.functional import Tree
from moejax.layers import placement
from moejax.layers.blocks import Block, Context, SparseForm
from moejax.layers.norms import NORMS
from moejax.layers.stack import Layers, Remat, Stack
from moejax.routing.router import RouterOutput


class Transformer(nnx.Module):
  """`num_layers` pre-norm blocks, dense or sparse, and a final norm.

  Config keys:
    num_layers: L.
    attention: of every block; see `Attention`.
    feed_forward: of dense blocks; see `FeedForward`.
    moe: of sparse blocks; see `MoE`. May be None where no layer is sparse.
    sparse: which layers are sparse; see `placement`.
    extra_feed_forward: of one more dense branch after each mixture of experts (ST-MoE), or None.
    sparse_form: a mixture of experts replaces the feed-forward of its block, or is inserted after it (BASE layers).
    norm: of every branch and at the end; see `norms`.
    dropout: on every branch.
    stochastic_depth: rate at which branches of the last block are dropped; linear in depth from 0 at the first.
    layers: scanned (only distinct blocks are compiled) or unrolled.
    remat: what of each block is kept for the backward pass.
  """

  def __init__(self, *, where: str, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, num_layers: int, attention: Mapping,
               feed_forward: Mapping, norm: Mapping, moe: Mapping | None = None,
               sparse: Mapping = dict(name='none'), extra_feed_forward: Mapping | None = None,
               sparse_form: SparseForm = 'replace', dropout: float = 0., stochastic_depth: float = 0.,
               layers: Layers = 'unrolled', remat: Remat = 'none', cross_attention: bool = False):
    self.stack = Stack(placement.kinds(sparse, f'{where}.sparse', num_layers), layers, remat)

    def block(kind: str, rngs: nnx.Rngs) -> Block:
      return Block(kind, where=where, dim=dim, num_layers=num_layers, dtype=dtype, rngs=rngs, attention=attention,
                   feed_forward=feed_forward, moe=moe, norm=norm, extra_feed_forward=extra_feed_forward,
                   sparse_form=sparse_form, dropout=dropout, stochastic_depth=stochastic_depth,
                   cross_attention=cross_attention)

    self.blocks = self.stack.build(block, rngs)
    self.final_norm = NORMS.build(norm, f'{where}.norm', dim=dim, axis='norm', rngs=rngs)

  def transform(self, x: jax.Array, context: Context, *, key: jax.Array | None,
                train: bool) -> tuple[jax.Array, dict[str, RouterOutput], Tree]:
    """x: <float>[B,S,D] -> (the same, router outputs by depth, router state that changes)."""
    def step(block, x, key, depth):
      return block(x, context, key=key, depth=depth, train=train)

    x, routers, updates = self.stack.run(self.blocks, step, x, key)
    return self.final_norm(x), routers, dict(blocks=updates) if updates else {}
