"""Speech recognition: an encoder with a CTC head, and a shared embedding network for its routers (SpeechMoE,
2105.03036)."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import call
from moejax.functional import Tree
from moejax.layers import initializers
from moejax.layers.attend import Mask
from moejax.layers.embeddings import Linear
from moejax.layers.positions import position_encoding
from moejax.layers.stack import Depth
from moejax.layers.sublayer import Context
from moejax.layers.kinds import TransformerConfig
from moejax.layers.transformer import Encoded, Transformer
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.random import derive
from moejax.ranges import Count, Rate
from moejax.routing.inputs import RouterInputs


class AcousticEncoder(nnx.Module):
  """Frames to logits of labels, one per frame."""

  def __init__(self, keys: TransformerConfig, *, rngs: nnx.Rngs, num_features: int, vocab_size: int, dtype: jnp.dtype,
               dim: int, positions: Mapping):
    self.transformer = Transformer(keys, dim=dim, dtype=dtype, rngs=rngs)
    build: dict[str, Any] = dict(init=initializers.fan_in(in_axis=0, out_axis=1), dtype=dtype, rngs=rngs,
                                 bias_init=nnx.initializers.zeros)
    self.embedding = Linear(shape=(num_features, dim), axes=(None, 'embed'), **build)
    self.encoding = position_encoding(positions, '.positions', dim=dim, rngs=rngs, heads=self.transformer.heads,
                                      bidirectional=True)
    self.head = Linear(shape=(dim, vocab_size), axes=('embed', 'vocab'), **build)

  def encode(self, batch: Tree, shared: jax.Array | None, *, key: jax.Array | None,
             train: bool) -> tuple[jax.Array, Encoded]:
    """(logits <float32>[B,S,V], the encoded frames); `shared`: <float>[B,S,De] for routers, or None."""
    x, context = self.embed(batch, shared)
    encoded = self.transformer(x, context, key=key, train=train)
    return self.head(encoded.x, jnp.float32), encoded

  def embed(self, batch: Tree, shared: jax.Array | None = None) -> tuple[jax.Array, Context]:
    """The embedded frames <float>[B,S,D], and what all blocks read."""
    segments = batch['segments']
    length = segments.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    x = self.encoding.embed(self.embedding(batch['frames']), positions)
    return x, Context(RouterInputs(valid=segments > 0, positions=positions, shared=shared), self.encoding,
                      bias=self.encoding.bias(length, length), mask=Mask(segments, segments))


class SharedNetwork(AcousticEncoder):
  """The shared embedding network: dense, with its own CTC head, whose inputs are also the routers'.

  Config:
    dim: width.
    num_layers, attention, feed_forward, dropout: see `TransformerConfig`.
  """

  def __init__(self, *, rngs: nnx.Rngs, num_features: int, vocab_size: int, dtype: jnp.dtype, dim: Count,
               num_layers: Depth, attention: Mapping, feed_forward: Mapping, norm: Mapping, positions: Mapping,
               dropout: Rate = 0.):
    keys = TransformerConfig(num_layers=num_layers, attention=attention, feed_forward=feed_forward, norm=norm,
                             dropout=dropout)
    super().__init__(keys, rngs=rngs, num_features=num_features, vocab_size=vocab_size, dtype=dtype, dim=dim,
                     positions=positions)


@MODELS('speech')
class Speech(AcousticEncoder):
  """Frames to logits of labels; label 0 is CTC's blank.

  Config keys besides those of `TransformerConfig`:
    num_features, vocab_size, dim: sizes; vocab_size includes the blank.
    norm: for every branch and at the end; see `norms`.
    positions: see `positions`.
    shared: the shared embedding network, as `dict(dim=, num_layers=, attention=, feed_forward=, dropout=)`, or None.
      All routers see its output (feature 'with_shared') without a gradient: only its own head trains it.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, rngs: nnx.Rngs, num_features: Count, vocab_size: Count, dim: Count,
               shared: Mapping | None = None, norm: Mapping = dict(name='layer_norm'),
               positions: Mapping = dict(name='rope'), dtype: Dtype = 'float32', **transformer: TransformerConfig):
    common: dict[str, Any] = dict(rngs=rngs, num_features=num_features, vocab_size=vocab_size, dtype=compute_dtype(dtype),
                  positions=positions)
    super().__init__(call(TransformerConfig, transformer, '', norm=norm), dim=dim, **common)
    self.shared_network = None if shared is None else call(SharedNetwork, shared, '.shared', norm=norm, **common)

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: frames <float>[B,S,num_features], segments <int32>[B,S] (0 is padding).

    Returns:
      With a shared network, `extras['shared_logits']` <float32>[B,S,V] are the logits of its head.
    """
    embedded, extras = None, {}
    if self.shared_network is not None:
      extras['shared_logits'], network = self.shared_network.encode(batch, None, key=derive(key, 'shared'), train=train)
      embedded = jax.lax.stop_gradient(network.x)
    logits, encoded = self.encode(batch, embedded, key=key, train=train)
    return ModelOutput(logits, encoded.x, encoded.routers, encoded.updates, extras)
