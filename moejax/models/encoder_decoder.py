"""The encoder-decoder of T5 1.1 (1910.10683) and its sparse relatives: Switch (2101.03961), ST-MoE (2202.08906)."""
from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax import nnx

from moejax.config import at, call
from moejax.functional import Tree
from moejax.layers.attend import Mask
from moejax.layers.embeddings import Embedding, TokenHead
from moejax.layers.positions import PositionEncoding, position_encoding
from moejax.layers.sublayer import Context
from moejax.layers.kinds import TransformerConfig
from moejax.layers.transformer import Transformer
from moejax.models import causality, sequences
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.random import derive
from moejax.random import dropout as drop
from moejax.ranges import Count, Rate


@MODELS('encoder_decoder')
class EncoderDecoder(nnx.Module):
  """A bidirectional encoder, and a decoder that attends to its output. Both share one embedding.

  Config keys:
    vocab_size, dim: sizes.
    encoder, decoder: the keys of `TransformerConfig`, for each; only the encoder accepts non-causal routers.
    positions: see `positions`; each side has its own.
    dropout: in the blocks, and on embeddings and the output of each side.
    embedding_init: initialisation of the embedding table.
    head: see `TokenHead`.
    routing_leak: as in the decoder-only model, for the decoder.
    norm: for every branch and at the end of each side; see `norms`.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, rngs: nnx.Rngs, vocab_size: Count, dim: Count, encoder: Mapping, decoder: Mapping,
               positions: Mapping = dict(name='relative_bias'), norm: Mapping = dict(name='rms_norm'),
               embedding_init: Mapping = dict(name='normal', std=1.),
               head: Literal['untied', 'tied', 'tied_scaled'] = 'untied',
               routing_leak: causality.RoutingLeak = 'refuse', dropout: Rate = 0., dtype: Dtype = 'float32'):
    build: dict[str, Any] = dict(dim=dim, dtype=compute_dtype(dtype), rngs=rngs)
    self.dropout = dropout
    self.embedding = Embedding(vocab_size=vocab_size, init=embedding_init, **build)

    def side(config: Mapping, name: str) -> tuple[Transformer, PositionEncoding]:
      with at(f'.{name}'):
        keys = call(TransformerConfig, config, '', norm=norm, dropout=dropout)
        transformer = Transformer(keys, **build, cross_attention=name == 'decoder')
      return transformer, position_encoding(positions, '.positions', dim=dim, rngs=rngs, heads=transformer.heads,
                                            bidirectional=name == 'encoder')

    self.encoder, self.encoder_encoding = side(encoder, 'encoder')
    self.decoder, self.decoder_encoding = side(decoder, 'decoder')
    causality.check(self.decoder, routing_leak)
    self.head = TokenHead(head, vocab_size=vocab_size, **build)

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: encoder_tokens <int32>[B,T], decoder_tokens <int32>[B,S] (the targets shifted right), and optionally
    segments and positions of each; a decoder token attends to the encoder tokens of its own segment."""
    sources, targets = sequences.read(batch, 'encoder_'), sequences.read(batch, 'decoder_')
    side_keys = derive(key, 'encoder'), derive(key, 'decoder')
    finish = lambda x, key: drop(x, self.dropout, key=derive(key, 'output'), train=train)

    x, context = self._embed(self.encoder_encoding, sources, causal=False)
    encoded = self.encoder(x, context, key=side_keys[0], train=train)
    memory = finish(encoded.x, side_keys[0])

    x, context = self._embed(self.decoder_encoding, targets, causal=True, memory=memory,
                             memory_mask=Mask(targets.segments, sources.segments))
    decoded = self.decoder(x, context, key=side_keys[1], train=train)
    features = finish(decoded.x, side_keys[1])

    routers = {f'encoder_{depth}': output for depth, output in encoded.routers.items()}
    routers |= {f'decoder_{depth}': output for depth, output in decoded.routers.items()}
    sides = dict(encoder=encoded.updates, decoder=decoded.updates)
    return ModelOutput(self.head(features, self.embedding), features, routers,
                       {name: updates for name, updates in sides.items() if updates})

  def _embed(self, encoding: PositionEncoding, tokens: sequences.TokenRows, *, causal: bool,
             **memory) -> tuple[jax.Array, Context]:
    length = tokens.ids.shape[1]
    x = encoding.embed(self.embedding(tokens.ids), tokens.positions)
    return x, Context(tokens.router_inputs, encoding, bias=encoding.bias(length, length),
                      mask=Mask(tokens.segments, tokens.segments, causal=causal), **memory)
