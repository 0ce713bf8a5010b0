"""The encoder-decoder of T5 1.1 (1910.10683) and its sparse relatives: Switch (2101.03961), ST-MoE (2202.08906)."""
from collections.abc import Mapping
from typing import Literal

import jax
from flax import nnx

from moejax.config import call
from moejax.functional import Tree
from moejax.layers.attention import attention_mask
from moejax.layers.blocks import Context
from moejax.layers.dropout import dropout as drop
from moejax.layers.embeddings import Embedding, TokenHead
from moejax.layers.positions import position_encoding
from moejax.layers.transformer import Transformer
from moejax.models import causality, sequences
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import Count, Rate


@MODELS('encoder_decoder')
class EncoderDecoder(nnx.Module):
  """A bidirectional encoder, and a decoder that attends to its output. Both share one embedding.

  Config keys:
    vocab_size, dim: sizes.
    encoder, decoder: the keys of `Transformer`, for each; only the encoder accepts non-causal routers.
    positions: see `positions`; each side has its own.
    dropout: in the blocks, and on embeddings and the output of each side.
    embedding_init: initialisation of the embedding table.
    head: see `TokenHead`.
    routing_leak: as in the decoder-only model, for the decoder.
    norm: for every branch and at the end of each side; see `norms`.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, where: str, rngs: nnx.Rngs, vocab_size: Count, dim: Count, encoder: Mapping, decoder: Mapping,
               positions: Mapping = dict(name='relative_bias'), norm: Mapping = dict(name='rms_norm'),
               embedding_init: Mapping = dict(name='normal', std=1.),
               head: Literal['untied', 'tied', 'tied_scaled'] = 'untied',
               routing_leak: causality.RoutingLeak = 'refuse', dropout: Rate = 0., dtype: Dtype = 'float32'):
    dtype = compute_dtype(dtype)
    self.dropout = dropout
    self.embedding = Embedding(vocab_size=vocab_size, dim=dim, init=embedding_init, where=f'{where}.embedding_init',
                               dtype=dtype, rngs=rngs)

    def side(config, name):
      transformer = call(Transformer, config, f'{where}.{name}', dim=dim, dtype=dtype, rngs=rngs, norm=norm,
                         dropout=dropout, cross_attention=name == 'decoder')
      encoding = position_encoding(positions, f'{where}.positions', dim=dim, rngs=rngs,
                                   heads=config['attention'].get('heads'), bidirectional=name == 'encoder')
      return transformer, encoding

    self.encoder, self.encoder_encoding = side(encoder, 'encoder')
    self.decoder, self.decoder_encoding = side(decoder, 'decoder')
    causality.check(self.decoder.distinct_blocks(), f'{where}.decoder', routing_leak)
    self.head = TokenHead(head, vocab_size=vocab_size, dim=dim, dtype=dtype, rngs=rngs)

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: encoder_tokens <int32>[B,T], decoder_tokens <int32>[B,S] (the targets shifted right), and optionally
    segments and positions of each; a decoder token attends to the encoder tokens of its own segment."""
    sources, targets = sequences.read(batch, 'encoder_'), sequences.read(batch, 'decoder_')
    encoder_key, decoder_key = derive(key, 'encoder'), derive(key, 'decoder')
    memory, encoder_routers, encoder_updates = self._side(
        self.encoder, self.encoder_encoding, sources, encoder_key, train, causal=False)
    cross_mask = attention_mask(targets.segments, sources.segments, causal=False)
    features, decoder_routers, decoder_updates = self._side(
        self.decoder, self.decoder_encoding, targets, decoder_key, train, causal=True, memory=memory,
        memory_mask=cross_mask)
    routers = {f'encoder_{depth}': output for depth, output in encoder_routers.items()}
    routers |= {f'decoder_{depth}': output for depth, output in decoder_routers.items()}
    updates = {name: tree for name, tree in (('encoder', encoder_updates), ('decoder', decoder_updates)) if tree}
    return ModelOutput(self.head(features, self.embedding), features, routers, updates)

  def _side(self, transformer, encoding, tokens, key, train, *, causal, **memory):
    length = tokens.ids.shape[1]
    x = encoding.embed(self.embedding(tokens.ids), tokens.positions)
    x = drop(x, self.dropout, key=derive(key, 'embedding'), train=train)
    x = rules.constrain(x, ('batch', 'sequence', 'embed'))
    context = Context(tokens.router_inputs, encoding, bias=encoding.bias(length, length),
                      mask=attention_mask(tokens.segments, tokens.segments, causal=causal), **memory)
    x, routers, updates = transformer.transform(x, context, key=derive(key, 'blocks'), train=train)
    return drop(x, self.dropout, key=derive(key, 'output'), train=train), routers, updates
