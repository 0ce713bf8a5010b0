"""The decoder-only language model, dense or with mixtures of experts (GPT, Llama 2302.13971, Mixtral 2401.04088)."""
from collections.abc import Mapping
from typing import Literal

import jax
from flax import nnx

from moejax.functional import Tree
from moejax.layers.attention import attention_mask
from moejax.layers.blocks import Context, SparseForm
from moejax.layers.dropout import dropout as drop
from moejax.layers.embeddings import Embedding, TokenHead
from moejax.layers.positions import position_encoding
from moejax.layers.stack import Depth, Layers, Remat
from moejax.layers.transformer import Sharing, Transformer
from moejax.models import causality, sequences
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import Count, Rate


@MODELS('decoder')
class Decoder(Transformer):
  """Tokens to next-token logits; a token attends to itself and earlier tokens of its segment.

  Config keys besides those of `Transformer`:
    vocab_size, dim: sizes.
    positions: see `positions`.
    embedding_init: initialisation of the embedding table.
    head: see `TokenHead`.
    routing_leak: 'refuse' accepts only routers that never see later tokens; 'slots' also routers in which later tokens
      compete for capacity, 'train' also routers that see later tokens in training only, 'oracle' any.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, where: str, rngs: nnx.Rngs, vocab_size: Count, dim: Count, num_layers: Depth,
               attention: Mapping, feed_forward: Mapping, moe: Mapping | None = None,
               sparse: Mapping = dict(name='none'), extra_feed_forward: Mapping | None = None,
               sparse_form: SparseForm = 'replace', norm: Mapping = dict(name='rms_norm'),
               positions: Mapping = dict(name='rope'), embedding_init: Mapping = dict(name='normal', std=0.02),
               head: Literal['untied', 'tied', 'tied_scaled'] = 'untied',
               routing_leak: causality.RoutingLeak = 'refuse', dropout: Rate = 0., stochastic_depth: Rate = 0.,
               layers: Layers = 'unrolled', remat: Remat = 'none', sharing: Sharing = 'none',
               dtype: Dtype = 'float32'):
    dtype = compute_dtype(dtype)
    super().__init__(where=where, dim=dim, dtype=dtype, rngs=rngs, num_layers=num_layers, attention=attention,
                     feed_forward=feed_forward, norm=norm, moe=moe, sparse=sparse,
                     extra_feed_forward=extra_feed_forward, sparse_form=sparse_form, dropout=dropout,
                     stochastic_depth=stochastic_depth, layers=layers, remat=remat, sharing=sharing)
    causality.check(self.distinct_blocks(), where, routing_leak)
    self.dropout = dropout
    self.embedding = Embedding(vocab_size=vocab_size, dim=dim, init=embedding_init, where=f'{where}.embedding_init',
                               dtype=dtype, rngs=rngs)
    self.encoding = position_encoding(positions, f'{where}.positions', dim=dim, rngs=rngs,
                                      heads=attention.get('heads'), bidirectional=False)
    self.head = TokenHead(head, vocab_size=vocab_size, dim=dim, dtype=dtype, rngs=rngs)

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: tokens <int32>[B,S], and optionally segments and positions <int32>[B,S] of packed documents."""
    tokens = sequences.read(batch)
    length = tokens.ids.shape[1]
    x = self.encoding.embed(self.embedding(tokens.ids), tokens.positions)
    x = rules.constrain(drop(x, self.dropout, key=derive(key, 'embedding'), train=train), ('batch', 'sequence', 'embed'))
    context = Context(tokens.router_inputs, self.encoding, bias=self.encoding.bias(length, length),
                      mask=attention_mask(tokens.segments, tokens.segments, causal=True))
    features, routers, updates = self.transform(x, context, key=derive(key, 'blocks'), train=train)
    return ModelOutput(self.head(features, self.embedding), features, routers, updates)
