"""The decoder-only language model, dense or with mixtures of experts (GPT, Llama 2302.13971, Mixtral 2401.04088)."""
from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax import nnx

from moejax.config import call
from moejax.functional import Tree
from moejax.layers.embeddings import Embedding, TokenHead
from moejax.layers.positions import position_encoding
from moejax.layers.sublayer import Context
from moejax.layers.kinds import TransformerConfig
from moejax.layers.transformer import Transformer
from moejax.models import causality, sequences
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.ranges import Count


@MODELS('decoder')
class Decoder(nnx.Module):
  """TokenRows to next-token logits; a token attends to itself and earlier tokens of its segment.

  Config keys besides those of `TransformerConfig`:
    vocab_size, dim: sizes.
    norm: for every branch and at the end; see `norms`.
    positions: see `positions`.
    embedding_init: initialisation of the embedding table.
    head: see `TokenHead`.
    routing_leak: 'refuse' accepts only routers that never see later tokens; 'slots' also routers in which later tokens
      compete for capacity, 'train' also routers that see later tokens in training only, 'oracle' any.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, rngs: nnx.Rngs, vocab_size: Count, dim: Count, norm: Mapping = dict(name='rms_norm'),
               positions: Mapping = dict(name='rope'), embedding_init: Mapping = dict(name='normal', std=0.02),
               head: Literal['untied', 'tied', 'tied_scaled'] = 'untied',
               routing_leak: causality.RoutingLeak = 'refuse', dtype: Dtype = 'float32',
               **transformer: TransformerConfig):
    build: dict[str, Any] = dict(dim=dim, dtype=compute_dtype(dtype), rngs=rngs)
    self.transformer = Transformer(call(TransformerConfig, transformer, '', norm=norm), **build)
    causality.check(self.transformer, routing_leak)
    self.embedding = Embedding(vocab_size=vocab_size, init=embedding_init, **build)
    self.encoding = position_encoding(positions, '.positions', dim=dim, rngs=rngs, heads=self.transformer.heads,
                                      bidirectional=False)
    self.head = TokenHead(head, vocab_size=vocab_size, **build)

  def __call__(self, batch: Tree, *, cache: Tree | None = None, key: jax.Array | None = None,
               train: bool = False) -> ModelOutput:
    """Applies the model.

    Args:
      batch: tokens <int32>[B,S], and optionally segments and positions <int32>[B,S] of packed documents.
      cache: what the model remembers of the rows so far, from `init_cache` or the last output; the batch holds the
        tokens after it, all rows of one document, with padding (segment 0) at their ends.
      key: for noise and dropout.
      train: whether to apply noise and dropout.
    """
    tokens = sequences.read(batch, past=cache)
    x, context = self.embed(tokens)
    encoded = self.transformer(x, context, None if cache is None else cache['blocks'], key=key, train=train)
    return ModelOutput(self.head(encoded.x, self.embedding), encoded.x, encoded.routers, encoded.updates,
                       cache=None if cache is None else dict(sequences.remember(cache, tokens), blocks=encoded.cache))

  def embed(self, tokens: sequences.TokenRows) -> tuple[jax.Array, Context]:
    """The embedded tokens <float>[B,S,D], and what all blocks read."""
    x = self.encoding.embed(self.embedding(tokens.ids), tokens.positions)
    return x, Context(tokens.router_inputs, self.encoding, bias=sequences.bias(self.encoding, tokens),
                      mask=sequences.mask(tokens, causal=True))

  def init_cache(self, batch: int, length: int) -> Tree:
    """What the model remembers of B rows of at most `length` tokens, before the first. Raises ConfigError for a router
    that sees later tokens."""
    causality.check_cache(self.transformer)
    return dict(sequences.init_cache(batch), blocks=self.transformer.init_cache(batch, length))

  def cache_axes(self) -> Tree:
    """Logical names of the axes of `init_cache`."""
    return dict(sequences.CACHE_AXES, blocks=self.transformer.cache_axes())
