"""Speech recognition: an encoder with a CTC head, and a shared embedding network for its routers (SpeechMoE,
2105.03036)."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import call
from moejax.functional import Tree
from moejax.layers import initializers
from moejax.layers.attention import attention_mask
from moejax.layers.blocks import Context
from moejax.layers.dropout import dropout as drop
from moejax.layers.embeddings import Linear
from moejax.layers.positions import position_encoding
from moejax.layers.stack import Depth, Layers, Remat
from moejax.layers.transformer import Transformer
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import Count, Rate
from moejax.routing.inputs import RouterInputs
from moejax.routing.router import RouterOutput


class AcousticEncoder(Transformer):
  """Frames to logits of labels, one per frame. Its own keys are `dim` and `positions`, the others `Transformer`'s."""

  def __init__(self, *, where: str, rngs: nnx.Rngs, num_features: int, vocab_size: int, dtype: jnp.dtype, dim: int,
               attention: Mapping, positions: Mapping, dropout: float, **transformer):
    super().__init__(where=where, dim=dim, dtype=dtype, rngs=rngs, attention=attention, dropout=dropout, **transformer)
    self.dropout = dropout
    fan_in = initializers.fan_in(in_axis=0, out_axis=1)
    build = dict(init=fan_in, bias_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
    self.embedding = Linear(shape=(num_features, dim), axes=(None, 'embed'), **build)
    self.encoding = position_encoding(positions, f'{where}.positions', dim=dim, rngs=rngs,
                                      heads=attention.get('heads'), bidirectional=True)
    self.head = Linear(shape=(dim, vocab_size), axes=('embed', 'vocab'), **build)

  def encode(self, batch: Tree, shared: jax.Array | None, *, key: jax.Array | None,
             train: bool) -> tuple[jax.Array, jax.Array, dict[str, RouterOutput], Tree]:
    """(logits <float32>[B,S,V], features <float>[B,S,D], router outputs by depth, updates of router state)."""
    segments = batch['segments']
    length = segments.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    x = self.encoding.embed(self.embedding(batch['frames']), positions)
    x = rules.constrain(drop(x, self.dropout, key=derive(key, 'embedding'), train=train), ('batch', 'sequence', 'embed'))
    context = Context(RouterInputs(valid=segments > 0, positions=positions, shared=shared), self.encoding,
                      bias=self.encoding.bias(length, length),
                      mask=attention_mask(segments, segments, causal=False))
    x, routers, updates = self.transform(x, context, key=derive(key, 'blocks'), train=train)
    return self.head(x, jnp.float32), x, routers, updates


class SharedNetwork(AcousticEncoder):
  """The shared embedding network: dense, with its own CTC head, whose inputs are also the routers'.

  Config:
    dim: width.
  """

  def __init__(self, *, where: str, rngs: nnx.Rngs, num_features: int, vocab_size: int, dtype: jnp.dtype, dim: Count,
               num_layers: Depth, attention: Mapping, feed_forward: Mapping, norm: Mapping, positions: Mapping,
               dropout: Rate = 0.):
    super().__init__(where=where, rngs=rngs, num_features=num_features, vocab_size=vocab_size, dtype=dtype, dim=dim,
                     num_layers=num_layers, attention=attention, feed_forward=feed_forward, norm=norm,
                     positions=positions, dropout=dropout)


@MODELS('speech')
class Speech(AcousticEncoder):
  """Frames to logits of labels; label 0 is CTC's blank.

  Config keys besides those of `Transformer`:
    num_features, vocab_size, dim: sizes; vocab_size includes the blank.
    positions: see `positions`.
    shared: the shared embedding network, as `dict(dim=, num_layers=, attention=, feed_forward=, dropout=)`, or None.
      All routers see its output (feature 'with_shared') without a gradient: only its own head trains it.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, where: str, rngs: nnx.Rngs, num_features: Count, vocab_size: Count, dim: Count,
               num_layers: Depth, attention: Mapping, feed_forward: Mapping, shared: Mapping | None = None,
               moe: Mapping | None = None, sparse: Mapping = dict(name='none'),
               extra_feed_forward: Mapping | None = None, norm: Mapping = dict(name='layer_norm'),
               positions: Mapping = dict(name='rope'), dropout: Rate = 0., stochastic_depth: Rate = 0.,
               layers: Layers = 'unrolled', remat: Remat = 'none', dtype: Dtype = 'float32'):
    common = dict(rngs=rngs, num_features=num_features, vocab_size=vocab_size, dtype=compute_dtype(dtype), norm=norm,
                  positions=positions)
    super().__init__(where=where, dim=dim, num_layers=num_layers, attention=attention, feed_forward=feed_forward,
                     moe=moe, sparse=sparse, extra_feed_forward=extra_feed_forward, dropout=dropout,
                     stochastic_depth=stochastic_depth, layers=layers, remat=remat, **common)
    self.shared_network = None if shared is None else call(SharedNetwork, shared, f'{where}.shared', **common)

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: frames <float>[B,S,num_features], segments <int32>[B,S] (0 is padding).

    Returns:
      With a shared network, `extras['shared_logits']` <float32>[B,S,V] are the logits of its head.
    """
    embedded, extras = None, {}
    if self.shared_network is not None:
      extras['shared_logits'], embedded, _, _ = self.shared_network.encode(
          batch, None, key=derive(key, 'shared'), train=train)
      embedded = jax.lax.stop_gradient(embedded)
    logits, features, routers, updates = self.encode(batch, embedded, key=key, train=train)
    return ModelOutput(logits, features, routers, updates, extras)
