"""The language model of the first sparsely-gated MoE: LSTM, mixture of experts, LSTM (1701.06538, appendix C.1)."""
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import call, config_path
from moejax.functional import Tree
from moejax.layers.embeddings import Embedding, TokenHead
from moejax.layers.feed_forwards.moe import MoE
from moejax.layers.mixers.lstm import LSTM
from moejax.layers.positions import PositionEncoding
from moejax.layers.stack import caches_of, routers_of, updates_of
from moejax.layers.sublayer import Caches, Context, Left
from moejax.models import causality, sequences
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.parallel import rules
from moejax.random import derive
from moejax.random import dropout as drop
from moejax.ranges import Count, Rate

MixtureOutput = Literal['sigmoid', 'linear']


class LSTMBlock(nnx.Module):
  """`x + dropout(layer(x))`, where the layer is an LSTM, or a mixture of experts with a sigmoid on its output.

  `moe`: keys of `MoE`, or None for an LSTM.
  """

  def __init__(self, moe: Mapping | None, *, dim: int, dropout: float, mixture_output: MixtureOutput,
               dtype: jnp.dtype, rngs: nnx.Rngs):
    self.dropout, self.mixture_output = dropout, mixture_output
    self.lstm = LSTM(dim=dim, dtype=dtype, rngs=rngs) if moe is None else None
    self.moe = None if moe is None else call(MoE, moe, '.moe', dim=dim, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context, cache: Caches | None = None, *, key: jax.Array | None,
               train: bool) -> tuple[jax.Array, dict[str, Left]]:
    """x: <float>[B,S,D] -> the same shape, and what the layer leaves."""
    y, left = x, {}
    if self.lstm is not None:
      y, left['lstm'] = self.lstm(x, context, (cache or {}).get('lstm'))
    if self.moe is not None:
      y, left['moe'] = self.moe(x, context, key=derive(key, 'moe'), train=train)
      y = jax.nn.sigmoid(y) if self.mixture_output == 'sigmoid' else y
    y = drop(y, self.dropout, key=derive(key, 'dropout'), train=train)
    return rules.constrain(x + y.astype(x.dtype), ('batch', 'sequence', 'embed')), left


@MODELS('lstm')
class RecurrentModel(nnx.Module):
  """TokenRows to next-token logits: embedding, LSTM, mixture of experts, LSTM, softmax.

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

  def __init__(self, *, rngs: nnx.Rngs, vocab_size: Count, dim: Count, moe: Mapping | None = None,
               mixture_output: MixtureOutput = 'sigmoid', dropout: Rate = 0.,
               embedding_init: Mapping = dict(name='normal', std=0.02),
               head: Literal['untied', 'tied', 'tied_scaled'] = 'untied',
               routing_leak: causality.RoutingLeak = 'refuse', dtype: Dtype = 'float32'):
    build: dict[str, Any] = dict(dim=dim, dtype=compute_dtype(dtype), rngs=rngs)
    self.dropout = dropout
    self.embedding = Embedding(vocab_size=vocab_size, init=embedding_init, **build)
    layers = [None, moe, None] if moe is not None else [None, None]
    self.blocks = nnx.List([LSTMBlock(layer, dropout=dropout, mixture_output=mixture_output, **build) for layer in layers])
    self.where = f'{config_path()}.moe'
    for mixture in self._mixtures():
      for train in (True, False):
        causality.refuse(mixture.leak(train), f'{self.where}.router', train, routing_leak)
    self.head = TokenHead(head, vocab_size=vocab_size, **build)

  def __call__(self, batch: Tree, *, cache: Tree | None = None, key: jax.Array | None = None,
               train: bool = False) -> ModelOutput:
    """batch: tokens <int32>[B,S], and optionally segments and positions <int32>[B,S] of packed documents; `cache`: see
    `Decoder`."""
    tokens = sequences.read(batch, past=cache)
    x = drop(self.embedding(tokens.ids), self.dropout, key=derive(key, 'embedding'), train=train)
    context, caches = Context(tokens.router_inputs, PositionEncoding()), {} if cache is None else cache['blocks']
    routers, updates, remembered = {}, {}, {}
    for depth, block in enumerate(self.blocks):
      name = str(depth)
      x, left = block(x, context, caches.get(name), key=derive(key, depth), train=train)
      routers |= routers_of(f'block_{depth:02d}', left)
      if changed := updates_of(left):
        updates[name] = changed
      if kept := caches_of(left):
        remembered[name] = kept
    return ModelOutput(self.head(x, self.embedding), x, routers, dict(blocks=updates) if updates else {},
                       cache=None if cache is None else dict(sequences.remember(cache, tokens), blocks=remembered))

  def init_cache(self, batch: int, length: int) -> Tree:
    """What the LSTMs remember of B rows without tokens, which does not grow with `length`. Raises ConfigError for a
    router that sees later tokens."""
    for mixture in self._mixtures():
      causality.refuse_cache({self.where: mixture.leak(False)})
    return dict(sequences.init_cache(batch), blocks=self._of_lstms(lambda lstm: lstm.init_cache(batch, length)))

  def cache_axes(self) -> Tree:
    """Logical names of the axes of `init_cache`."""
    return dict(sequences.CACHE_AXES, blocks=self._of_lstms(lambda lstm: lstm.cache_axes()))

  def _mixtures(self) -> list[MoE]:
    return [block.moe for block in self.blocks if block.moe is not None]

  def _of_lstms(self, what: Callable[[LSTM], Any]) -> Tree:
    return {str(depth): dict(lstm=what(block.lstm)) for depth, block in enumerate(self.blocks) if block.lstm is not None}
