"""The encoder-decoder of T5 1.1 (1910.10683) and its sparse relatives: Switch (2101.03961), ST-MoE (2202.08906)."""
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
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

  def __call__(self, batch: Tree, *, cache: Tree | None = None, key: jax.Array | None = None,
               train: bool = False) -> ModelOutput:
    """Applies the model.

    Args:
      batch: encoder_tokens <int32>[B,T], decoder_tokens <int32>[B,S] (the targets shifted right), and optionally
        segments and positions of each; a decoder token attends to the encoder tokens of its own segment.
      cache: what the decoder remembers of the rows so far, from `init_cache` or the last output. The first batch has the
        source and the first decoder tokens; the following ones have only decoder tokens, and run only the decoder. All
        tokens of a row are of one document, with padding (segment 0) at the ends of source and target.
      key: for noise and dropout.
      train: whether to apply noise and dropout.
    """
    encoder_key, decoder_key = derive(key, 'encoder'), derive(key, 'decoder')
    finish = lambda x, key: drop(x, self.dropout, key=derive(key, 'output'), train=train)

    memory, routers, updates = None, {}, {}
    if cache is None or 'encoder_tokens' in batch:
      sources = sequences.read(batch, 'encoder_')
      x, context = self._embed(self.encoder_encoding, sources, causal=False)
      encoded = self.encoder(x, context, key=encoder_key, train=train)
      memory, source_segments = finish(encoded.x, encoder_key), sources.segments
      if cache is not None:
        memory, source_segments = in_room(memory, source_segments, cache['source_segments'].shape[1])
      routers |= {f'encoder_{depth}': output for depth, output in encoded.routers.items()}
      updates |= dict(encoder=encoded.updates)
    else:
      source_segments = cache['source_segments']

    targets = sequences.read(batch, 'decoder_', past=cache)
    x, context = self._embed(self.decoder_encoding, targets, causal=True, memory=memory,
                             memory_mask=Mask(targets.segments, source_segments))
    decoded = self.decoder(x, context, None if cache is None else cache['blocks'], key=decoder_key, train=train)
    features = finish(decoded.x, decoder_key)
    routers |= {f'decoder_{depth}': output for depth, output in decoded.routers.items()}
    updates |= dict(decoder=decoded.updates)
    return ModelOutput(self.head(features, self.embedding), features, routers,
                       {side: of_side for side, of_side in updates.items() if of_side},
                       cache=None if cache is None else dict(sequences.remember(cache, targets), blocks=decoded.cache,
                                                             source_segments=source_segments))

  def _embed(self, encoding: PositionEncoding, tokens: sequences.TokenRows, *, causal: bool,
             **memory) -> tuple[jax.Array, Context]:
    x = encoding.embed(self.embedding(tokens.ids), tokens.positions)
    return x, Context(tokens.router_inputs, encoding, bias=sequences.bias(encoding, tokens),
                      mask=sequences.mask(tokens, causal=causal), **memory)

  def init_cache(self, batch: int, length: int, source_length: int) -> Tree:
    """What the decoder remembers of B rows of at most `length` tokens, with sources of at most `source_length`, before
    the first: the keys and values of self-attention, and those of cross-attention, which the first call makes.

    Raises ConfigError for a router of the decoder that sees later tokens."""
    causality.check_cache(self.decoder)
    return dict(sequences.init_cache(batch), source_segments=jnp.zeros((batch, source_length), jnp.int32),
                blocks=self.decoder.init_cache(batch, length, source_length))

  def cache_axes(self) -> Tree:
    """Logical names of the axes of `init_cache`."""
    return dict(sequences.CACHE_AXES, source_segments=('batch', 'length'), blocks=self.decoder.cache_axes())


def in_room(memory: jax.Array, segments: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
  """<float>[B,T,D] and <int32>[B,T], with padding up to T = `room`. Raises ValueError if they are longer."""
  if segments.shape[1] > room:
    raise ValueError(f"the source has {segments.shape[1]} tokens, and the cache has room for {room}: call "
                     f'init_cache(batch, length, source_length={segments.shape[1]}), or shorten the source.')
  free = (0, room - segments.shape[1])
  return jnp.pad(memory, ((0, 0), free, (0, 0))), jnp.pad(segments, ((0, 0), free))
