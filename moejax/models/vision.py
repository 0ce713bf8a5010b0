"""The vision transformer, dense or with mixtures of experts (ViT 2010.11929, V-MoE 2106.05974, Soft MoE 2308.00951)."""
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import ConfigError, call
from moejax.functional import Tree
from moejax.layers import initializers
from moejax.layers.attention import Attention
from moejax.layers.blocks import Context, SparseForm
from moejax.layers.dropout import dropout as drop
from moejax.layers.embeddings import Linear
from moejax.layers.feed_forward import FeedForward
from moejax.layers.norms import NORMS
from moejax.layers.positions import position_encoding
from moejax.layers.stack import Depth, Layers, Remat
from moejax.layers.transformer import Sharing, Transformer
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.parallel import rules
from moejax.random import derive
from moejax.ranges import Between, Count, Divides, Rate
from moejax.routing.inputs import RouterInputs

Side = Annotated[int, Between(1, 2**16)]


@MODELS('vision')
class VisionTransformer(Transformer):
  """Image classifier: patches are embedded as tokens of a `Transformer`, whose pooled output gives class logits.

  Config keys besides those of `Transformer`:
    image_size, channels, patch_size, num_classes, dim: sizes; patch_size divides image_size.
    positions: see `positions`; 'learned' has one per patch (and one for the class token).
    pool: 'gap': the mean over tokens; 'token': a class token prepended to the patches; 'map': attention with a learned
      query (2106.04560).
    head_init: initialisation of the head's kernel.
    head_bias: initial value of its bias; with '-log(num_classes)' sigmoid outputs start at the frequency of a class.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, where: str, rngs: nnx.Rngs, image_size: Side,
               patch_size: Annotated[Count, Divides('image_size')], num_classes: Count, dim: Count, num_layers: Depth,
               attention: Mapping, feed_forward: Mapping, channels: Count = 3,
               moe: Mapping | None = None, sparse: Mapping = dict(name='none'),
               extra_feed_forward: Mapping | None = None, sparse_form: SparseForm = 'replace',
               norm: Mapping = dict(name='layer_norm'), positions: Mapping = dict(name='learned'),
               pool: Literal['gap', 'token', 'map'] = 'gap', head_init: Literal['zeros', 'fan_in'] = 'zeros',
               head_bias: float | Literal['-log(num_classes)'] = 0., dropout: Rate = 0., stochastic_depth: Rate = 0.,
               layers: Layers = 'unrolled', remat: Remat = 'none', sharing: Sharing = 'none',
               dtype: Dtype = 'float32'):
    dtype = compute_dtype(dtype)
    super().__init__(where=where, dim=dim, dtype=dtype, rngs=rngs, num_layers=num_layers, attention=attention,
                     feed_forward=feed_forward, norm=norm, moe=moe, sparse=sparse,
                     extra_feed_forward=extra_feed_forward, sparse_form=sparse_form, dropout=dropout,
                     stochastic_depth=stochastic_depth, layers=layers, remat=remat, sharing=sharing)
    self.dtype, self.dropout, self.pool, self.patch_size = dtype, dropout, pool, patch_size
    self.image_shape = (image_size, image_size, channels)
    fan_in = initializers.fan_in(in_axis=0, out_axis=1)
    self.patches = Linear(shape=(patch_size * patch_size * channels, dim), axes=(None, 'embed'), init=fan_in,
                          bias_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
    prefix, side = int(pool == 'token'), image_size // patch_size
    self.class_token = (functional.parameter(rngs, nnx.initializers.zeros, (dim,), ('embed',))
                        if pool == 'token' else None)
    self.encoding = position_encoding(positions, f'{where}.positions', dim=dim, rngs=rngs, grid=(side, side),
                                      prefix=prefix, length=side * side + prefix, heads=attention.get('heads'),
                                      bidirectional=True)
    self.map_pool = (MapPool(where=where, dim=dim, dtype=dtype, rngs=rngs, attention=attention,
                             feed_forward=feed_forward, norm=norm) if pool == 'map' else None)
    bias = -math.log(num_classes) if head_bias == '-log(num_classes)' else head_bias
    self.head = Linear(shape=(dim, num_classes), axes=('embed', None), dtype=dtype, rngs=rngs,
                       init=nnx.initializers.zeros if head_init == 'zeros' else fan_in,
                       bias_init=nnx.initializers.constant(bias))

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: image <float>[B,H,W,C], optionally valid <bool>[B]: False for padding, which takes no capacity.

    Raises:
      ConfigError: the images do not have the configured shape.
    """
    images = batch['image']
    if images.shape[1:] != self.image_shape:
      raise ConfigError(f'config.model: images have shape {images.shape[1:]}, but the model expects {self.image_shape} '
                        '(image_size, image_size, channels). Set its image_size and channels as in config.data.')
    x = self.patches(patchify(images, self.patch_size))
    if self.class_token is not None:
      token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
      x = jnp.concatenate([token, x], axis=1)
    tokens = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(tokens[1]), tokens)
    valid = jnp.broadcast_to(batch['valid'][:, None], tokens) if 'valid' in batch else None
    x = self.encoding.embed(x, positions)
    x = rules.constrain(drop(x, self.dropout, key=derive(key, 'embedding'), train=train), ('batch', 'sequence', 'embed'))
    context = Context(RouterInputs(valid=valid, positions=positions), self.encoding,
                      bias=self.encoding.bias(tokens[1], tokens[1]))
    x, routers, updates = self.transform(x, context, key=derive(key, 'blocks'), train=train)
    features = {'gap': lambda: x.mean(axis=1), 'token': lambda: x[:, 0], 'map': lambda: self.map_pool(x)}[self.pool]()
    return ModelOutput(self.head(features, jnp.float32), features, routers, updates)


class MapPool(nnx.Module):
  """Multi-head attention pooling: a learned query attends to all tokens, then a feed-forward branch (2106.04560)."""

  def __init__(self, *, where: str, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, attention: Mapping,
               feed_forward: Mapping, norm: Mapping):
    build = dict(dim=dim, dtype=dtype, rngs=rngs)
    self.query = functional.parameter(rngs, nnx.initializers.xavier_uniform(), (1, dim), (None, 'embed'))
    self.attention = call(Attention, attention, f'{where}.attention', **build)
    self.norm = NORMS.build(norm, f'{where}.norm', dim=dim, axis='norm', rngs=rngs)
    self.feed_forward = call(FeedForward, feed_forward, f'{where}.feed_forward', **build)

  def __call__(self, x: jax.Array) -> jax.Array:
    """<float>[B,S,D] -> <float>[B,D]."""
    query = jnp.broadcast_to(self.query[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    pooled = self.attention(query, x)
    return (pooled + self.feed_forward(self.norm(pooled), key=None, train=False))[:, 0]


def patchify(images: jax.Array, size: int) -> jax.Array:
  """<float>[B,H,W,C] -> <float>[B,(H/size)*(W/size),size*size*C]: patches in row-major order, each row-major inside."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
