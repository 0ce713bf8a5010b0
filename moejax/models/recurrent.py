"""The language model of the first sparsely-gated MoE: LSTM, mixture of experts, LSTM (1701.06538, appendix C.1)."""
import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.functional import Tree
from moejax.layers.dropout import dropout as drop
from moejax.layers.embeddings import Embedding, TokenHead
from moejax.layers.moe import MoE
from moejax.layers.recurrent import LSTM
from moejax.models import causality, sequences
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import Count, Rate
from moejax.routing.inputs import RouterInputs
from moejax.routing.router import RouterOutput

MixtureOutput = Literal['sigmoid', 'linear']


class Block(nnx.Module):
  """`x + dropout(layer(x))`, where the layer is an LSTM, or a mixture of experts with a sigmoid on its output.

  `moe`: keys of `MoE`, or None for an LSTM.
  """

  def __init__(self, moe: Mapping | None, *, where: str, dim: int, dropout: float, mixture_output: MixtureOutput,
               dtype: jnp.dtype, rngs: nnx.Rngs):
    self.dropout, self.mixture_output = dropout, mixture_output
    self.lstm = LSTM(dim=dim, dtype=dtype, rngs=rngs) if moe is None else None
    self.moe = None if moe is None else MoE(moe, f'{where}.moe', dim=dim, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, inputs: RouterInputs, *, key: jax.Array | None,
               train: bool) -> tuple[jax.Array, RouterOutput | None]:
    """x: <float>[B,S,D] -> the same shape, and the router's output."""
    output = None
    if self.moe is None:
      y = self.lstm(x, inputs.positions == 0)
    else:
      y, output = self.moe(x, inputs, key=derive(key, 'moe'), train=train)
      y = jax.nn.sigmoid(y) if self.mixture_output == 'sigmoid' else y
    y = drop(y, self.dropout, key=derive(key, 'dropout'), train=train)
    return rules.constrain(x + y.astype(x.dtype), ('batch', 'sequence', 'embed')), output


@MODELS('lstm')
class RecurrentModel(nnx.Module):
  """Tokens to next-token logits: embedding, LSTM, mixture of experts, LSTM, softmax.

  Every layer but the last is followed by dropout and has a residual connection. The state is reset at the start of each
  document in a row.

  Config keys:
    vocab_size, dim: sizes; LSTMs are as wide as the embedding.
    moe: see `MoE`; None omits the layer.
    mixture_output: 'sigmoid' is applied to the output of the mixture, as in the paper; 'linear' is the identity.
    dropout: after embedding, LSTMs and mixture.
    embedding_init, head, routing_leak: as in `Decoder`.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, where: str, rngs: nnx.Rngs, vocab_size: Count, dim: Count, moe: Mapping | None = None,
               mixture_output: MixtureOutput = 'sigmoid', dropout: Rate = 0.,
               embedding_init: Mapping = dict(name='normal', std=0.02),
               head: Literal['untied', 'tied', 'tied_scaled'] = 'untied',
               routing_leak: causality.RoutingLeak = 'refuse', dtype: Dtype = 'float32'):
    dtype = compute_dtype(dtype)
    self.dropout = dropout
    self.embedding = Embedding(vocab_size=vocab_size, dim=dim, init=embedding_init, where=f'{where}.embedding_init',
                               dtype=dtype, rngs=rngs)
    layers = [None, moe, None] if moe is not None else [None, None]
    self.blocks = nnx.List([Block(layer, where=where, dim=dim, dropout=dropout, mixture_output=mixture_output,
                                  dtype=dtype, rngs=rngs) for layer in layers])
    causality.check(self.blocks, where, routing_leak)
    self.head = TokenHead(head, vocab_size=vocab_size, dim=dim, dtype=dtype, rngs=rngs)

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: tokens <int32>[B,S], and optionally segments and positions <int32>[B,S] of packed documents."""
    tokens = sequences.read(batch)
    x = drop(self.embedding(tokens.ids), self.dropout, key=derive(key, 'embedding'), train=train)
    inputs, routers, updates = tokens.router_inputs, {}, {}
    for depth, block in enumerate(self.blocks):
      x, output = block(x, inputs, key=derive(key, depth), train=train)
      if output is not None:
        routers[f'block_{depth:02d}'] = dataclasses.replace(output, updates={})
        if output.updates:
          updates[str(depth)] = dict(moe=dict(router=output.updates))
    return ModelOutput(self.head(x, self.embedding), x, routers, dict(blocks=updates) if updates else {})
