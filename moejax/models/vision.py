"""The vision transformer, dense or with mixtures of experts (ViT 2010.11929, V-MoE 2106.05974, Soft MoE 2308.00951)."""
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import ConfigError, call
from moejax.functional import Tree
from moejax.layers import initializers
from moejax.layers.block import without_branch_keys
from moejax.layers.embeddings import Linear
from moejax.layers.feed_forwards.dense import DenseFeedForward
from moejax.layers.mixers.attention import SelfAttention
from moejax.layers.norms import NORMS
from moejax.layers.positions import position_encoding
from moejax.layers.sublayer import Context
from moejax.layers.kinds import TransformerConfig
from moejax.layers.transformer import Transformer
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.ranges import Between, Count, Divides
from moejax.routing.inputs import RouterInputs

Side = Annotated[int, Between(1, 2**16)]


@MODELS('vision')
class VisionTransformer(nnx.Module):
  """Image classifier: patches are embedded as tokens of a `Transformer`, whose pooled output gives class logits.

  Config keys besides those of `TransformerConfig`:
    image_size, channels, patch_size, num_classes, dim: sizes; patch_size divides image_size.
    norm: for every branch and at the end; see `norms`.
    positions: see `positions`; 'learned' has one per patch (and one for the class token).
    pool: 'gap': the mean over tokens; 'token': a class token prepended to the patches; 'map': attention with a learned
      query (2106.04560).
    head_init: initialisation of the head's kernel.
    head_bias: initial value of its bias; with '-log(num_classes)' sigmoid outputs start at the frequency of a class.
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, rngs: nnx.Rngs, image_size: Side, patch_size: Annotated[Count, Divides('image_size')],
               num_classes: Count, dim: Count, channels: Count = 3, norm: Mapping = dict(name='layer_norm'),
               positions: Mapping = dict(name='learned'), pool: Literal['gap', 'token', 'map'] = 'gap',
               head_init: Literal['zeros', 'fan_in'] = 'zeros', head_bias: float | Literal['-log(num_classes)'] = 0.,
               dtype: Dtype = 'float32', **transformer: TransformerConfig):
    keys = call(TransformerConfig, transformer, '', norm=norm)
    build: dict[str, Any] = dict(dtype=compute_dtype(dtype), rngs=rngs)
    self.transformer = Transformer(keys, dim=dim, **build)
    self.patch_size, self.image_shape = patch_size, (image_size, image_size, channels)
    fan_in = initializers.fan_in(in_axis=0, out_axis=1)
    self.patches = Linear(shape=(patch_size * patch_size * channels, dim), axes=(None, 'embed'), init=fan_in,
                          bias_init=nnx.initializers.zeros, **build)
    prefix, side = int(pool == 'token'), image_size // patch_size
    self.class_token = (functional.parameter(rngs, nnx.initializers.zeros, (dim,), ('embed',))
                        if pool == 'token' else None)
    self.encoding = position_encoding(positions, '.positions', dim=dim, rngs=rngs, grid=(side, side), prefix=prefix,
                                      length=side * side + prefix, heads=self.transformer.heads, bidirectional=True)
    self.map_pool = MapPool(keys, dim=dim, **build) if pool == 'map' else None
    bias = -math.log(num_classes) if head_bias == '-log(num_classes)' else head_bias
    self.head = Linear(shape=(dim, num_classes), axes=('embed', None), **build,
                       init=nnx.initializers.zeros if head_init == 'zeros' else fan_in,
                       bias_init=nnx.initializers.constant(bias))

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """batch: image <float>[B,H,W,C], optionally valid <bool>[B]: False for padding, which takes no capacity.

    Raises:
      ConfigError: the images do not have the configured shape.
    """
    x, context = self.embed(batch)
    encoded = self.transformer(x, context, key=key, train=train)
    if self.map_pool is not None:
      features = self.map_pool(encoded.x)
    else:
      features = encoded.x.mean(axis=1) if self.class_token is None else encoded.x[:, 0]
    return ModelOutput(self.head(features, jnp.float32), features, encoded.routers, encoded.updates)

  def embed(self, batch: Tree) -> tuple[jax.Array, Context]:
    """The embedded patches <float>[B,S,D], after the class token if there is one, and what all blocks read."""
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
    return self.encoding.embed(x, positions), Context(
        RouterInputs(valid=valid, positions=positions), self.encoding, bias=self.encoding.bias(tokens[1], tokens[1]))


class MapPool(nnx.Module):
  """Multi-head attention pooling: a learned query attends to all tokens, then a feed-forward branch (2106.04560)."""

  def __init__(self, keys: TransformerConfig, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs):
    """Built like the layers of the model, which must be of the shorthand."""
    if keys.attention is None or keys.feed_forward is None:
      raise ConfigError(".pool = 'map' is built from attention and feed_forward, which are missing: set them in place of "
                        "blocks, or choose pool='gap' or 'token'.")
    build: dict[str, Any] = dict(dim=dim, dtype=dtype, rngs=rngs)
    self.query = functional.parameter(rngs, nnx.initializers.xavier_uniform(), (1, dim), (None, 'embed'))
    self.attention = call(SelfAttention, without_branch_keys(keys.attention), '.attention', **build)
    self.norm = NORMS.build(keys.norm, '.norm', dim=dim, axis='norm', rngs=rngs)
    self.feed_forward = call(DenseFeedForward, without_branch_keys(keys.feed_forward), '.feed_forward', **build)

  def __call__(self, x: jax.Array) -> jax.Array:
    """<float>[B,S,D] -> <float>[B,D]."""
    query = jnp.broadcast_to(self.query[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    pooled = self.attention.read(query, x)
    return (pooled + self.feed_forward(self.norm(pooled))[0])[:, 0]


def patchify(images: jax.Array, size: int) -> jax.Array:
  """<float>[B,H,W,C] -> <float>[B,(H/size)*(W/size),size*size*C]: patches in row-major order, each row-major inside."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
