"""The transformer block: attention, then a feed-forward layer or a mixture of experts, each on a normalised branch."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import call
from moejax.layers.attention import Attention
from moejax.layers.dropout import dropout as drop
from moejax.layers.feed_forward import FeedForward
from moejax.layers.moe import MoE
from moejax.layers.norms import NORMS
from moejax.layers.positions import PositionEncoding
from moejax.parallel import rules
from moejax.random import derive
from moejax.routing.inputs import RouterInputs
from moejax.routing.router import RouterOutput


# The mixture of a sparse block replaces the dense feed-forward, is inserted after it, or replaces the whole block, with
# blocks as experts (`block_mixture`).
SparseForm = Literal['replace', 'insert', 'layer']


@dataclasses.dataclass(frozen=True)
class Context:
  """Inputs of all blocks of a stack besides the activations.

  Attributes:
    inputs: for routers, with fields [B,S]; self-attention uses its positions too.
    encoding: rotates queries and keys of self-attention.
    mask: <bool>[B|1,1,S,S] for self-attention; None: no mask.
    bias: <float32>[1,H,S,S] for self-attention, or None.
    memory: <float>[B,T,D] for cross-attention, or None.
    memory_mask: <bool>[B,1,S,T] for cross-attention.
  """
  inputs: RouterInputs
  encoding: PositionEncoding
  mask: jax.Array | None = None
  bias: jax.Array | None = None
  memory: jax.Array | None = None
  memory_mask: jax.Array | None = None


class Norms(nnx.Module):
  """The norms of a block, held per layer while all other parameters are shared. Removes them from `block`."""

  NAMES = ('attention_norm', 'cross_attention_norm', 'feed_forward_norm', 'extra_norm')

  def __init__(self, block: 'Block'):
    for name in self.NAMES:
      setattr(self, name, getattr(block, name))
      setattr(block, name, None)


class Block(nnx.Module):
  """`x + attention(norm(x))`, then `x + cross_attention(norm(x))` in a decoder with a memory, then `x + f(norm(x))`,
  where f is a feed-forward layer in a dense block and a mixture of experts in a sparse block.

  With `sparse_form='insert'` a sparse block is a dense block followed by `x + mixture(x)`, a branch without a norm,
  whose experts have their own (BASE layers, 2103.16716). ST-MoE (2202.08906) adds one more dense feed-forward branch
  after the mixture: `extra_feed_forward`.
  Every branch has dropout; `stochastic_depth` is the rate of the last block, growing linearly from 0 at the first.
  """

  def __init__(self, kind: str, *, where: str, dim: int, num_layers: int, dtype: jnp.dtype, rngs: nnx.Rngs,
               attention: Mapping, feed_forward: Mapping, moe: Mapping | None, norm: Mapping,
               extra_feed_forward: Mapping | None = None, sparse_form: SparseForm = 'replace', dropout: float = 0.,
               stochastic_depth: float = 0., cross_attention: bool = False):
    self.dropout = dropout
    self.drop_step = stochastic_depth / max(num_layers - 1, 1)
    build = dict(dim=dim, dtype=dtype, rngs=rngs)
    new_norm = lambda: NORMS.build(norm, f'{where}.norm', dim=dim, axis='norm', rngs=rngs)

    self.attention_norm = new_norm()
    self.attention = call(Attention, attention, f'{where}.attention', **build)
    self.cross_attention_norm = new_norm() if cross_attention else None
    self.cross_attention = call(Attention, attention, f'{where}.attention', **build) if cross_attention else None
    self.feed_forward_norm = new_norm()
    has_dense = kind == 'dense' or sparse_form == 'insert'
    self.feed_forward = call(FeedForward, feed_forward, f'{where}.feed_forward', **build) if has_dense else None
    self.moe = MoE(moe, f'{where}.moe', **build) if kind == 'sparse' else None
    has_extra = kind == 'sparse' and extra_feed_forward is not None
    self.extra_norm = new_norm() if has_extra else None
    self.extra_feed_forward = (call(FeedForward, extra_feed_forward, f'{where}.extra_feed_forward', **build)
                               if has_extra else None)

  def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None, depth: Any, train: bool,
               norms: Norms | None = None) -> tuple[jax.Array, RouterOutput | None]:
    """x: <float>[B,S,D] -> the same shape, and the router's output, whose updates are nested by attribute.

    `norms`: used instead of the block's own, if those were removed.
    """
    norms = norms or self
    def add(x, branch, name):
      branch = drop(branch, self.dropout, key=derive(key, f'{name}_dropout'), train=train)
      if self.drop_step:
        branch = drop(branch, self.drop_step * depth, key=derive(key, f'{name}_depth'), train=train, shared_axes=(1, 2))
      return rules.constrain(x + branch.astype(x.dtype), ('batch', 'sequence', 'embed'))

    attended = self.attention(norms.attention_norm(x), mask=context.mask, bias=context.bias, encoding=context.encoding,
                              positions=context.inputs.positions, key=derive(key, 'attention'), train=train)
    x = add(x, attended, 'attention')
    if self.cross_attention is not None:
      attended = self.cross_attention(norms.cross_attention_norm(x), context.memory, mask=context.memory_mask,
                                      key=derive(key, 'cross_attention'), train=train)
      x = add(x, attended, 'cross_attention')

    unmixed = norms.feed_forward_norm(x)
    if self.feed_forward is not None:
      x = add(x, self.feed_forward(unmixed, key=derive(key, 'feed_forward'), train=train), 'feed_forward')
      if self.moe is None:
        return x, None
      unmixed = x
    mixed, output = self.moe(unmixed, context.inputs, key=derive(key, 'moe'), train=train)
    x = add(x, mixed, 'moe')
    if self.extra_feed_forward is not None:
      extra = self.extra_feed_forward(norms.extra_norm(x), key=derive(key, 'extra_feed_forward'), train=train)
      x = add(x, extra, 'extra_feed_forward')
    updates = dict(moe=dict(router=output.updates)) if output.updates else {}
    return x, dataclasses.replace(output, updates=updates)
