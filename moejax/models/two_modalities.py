"""One tower for images and text, trained contrastively (LIMoE, 2206.02770).

All blocks are shared. Each modality has its own token embedding, positions and output projection. The tokens of an
image and its text form one sequence, so that they are routed in one group and compete for the same experts; a mask
keeps attention within each modality.
"""
import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import call
from moejax.functional import Tree
from moejax.layers import initializers
from moejax.layers.attend import Mask
from moejax.layers.embeddings import Embedding, Linear
from moejax.layers.positions import Learned, PositionEncoding
from moejax.layers.sublayer import Context
from moejax.layers.kinds import TransformerConfig
from moejax.layers.transformer import Transformer
from moejax.models.output import ModelOutput
from moejax.models.registry import MODELS, Dtype, compute_dtype
from moejax.models.vision import Side, patchify
from moejax.ranges import Count, Divides, Positive
from moejax.routing.inputs import RouterInputs
from moejax.routing.balance.modality_entropy import MODALITIES
from moejax.routing.router import RouterOutput


@MODELS('two_modalities')
class TwoModalities(nnx.Module):
  """Images and texts to unit vectors; the logits are their products times a learned scale.

  Config keys besides those of `TransformerConfig`:
    image_size, channels, patch_size: of the images; patch_size divides image_size.
    vocab_size, text_length: of the texts.
    dim, embedding_dim: widths of the tower and of the unit vectors.
    norm: for every branch and at the end; see `norms`.
    embedding_init: initialisation of the texts' embedding table.
    scale: initial value of the learned scale (the inverse temperature).
    dtype: compute dtype of activations; parameters are float32.
  """

  def __init__(self, *, rngs: nnx.Rngs, image_size: Side, patch_size: Annotated[Count, Divides('image_size')],
               vocab_size: Count, text_length: Count, dim: Count, embedding_dim: Count, channels: Count = 3,
               norm: Mapping = dict(name='layer_norm'), embedding_init: Mapping = dict(name='normal', std=0.02),
               scale: Positive = 10., dtype: Dtype = 'float32', **transformer: TransformerConfig):
    build: dict[str, Any] = dict(dtype=compute_dtype(dtype), rngs=rngs)
    self.transformer = Transformer(call(TransformerConfig, transformer, '', norm=norm), dim=dim, **build)
    self.patch_size = patch_size
    fan_in = initializers.fan_in(in_axis=0, out_axis=1)
    self.image_embedding = Linear(shape=(patch_size**2 * channels, dim), axes=(None, 'embed'), init=fan_in,
                                  bias_init=nnx.initializers.zeros, **build)
    self.image_positions = Learned(dim=dim, rngs=rngs, length=(image_size // patch_size)**2)
    self.text_embedding = Embedding(vocab_size=vocab_size, dim=dim, init=embedding_init, **build)
    self.text_positions = Learned(dim=dim, rngs=rngs, length=text_length)
    head = lambda: Linear(shape=(dim, embedding_dim), axes=('embed', None), init=fan_in, **build)
    self.image_head, self.text_head = head(), head()
    self.log_scale = functional.parameter(rngs, nnx.initializers.constant(math.log(scale)), (), ())

  def __call__(self, batch: Tree, *, key: jax.Array | None = None, train: bool = False) -> ModelOutput:
    """Encodes image <float>[B,H,W,C], or tokens and segments <int32>[B,N] (0 is padding), or both; optionally with
    valid <bool>[B]: False for padding, which takes no capacity.

    Returns:
      Features are the means over the tokens of the images, or of the texts without images, <float>[B,D]. `extras` holds
      unit vectors <float32>[B,embedding_dim] by modality; the logits are empty unless the batch has both.
    """
    parts, segments, modalities = [], [], []
    if 'image' in batch:
      x = self.image_embedding(patchify(batch['image'], self.patch_size))
      parts.append(self.image_positions.embed(x, jnp.arange(x.shape[1])))
      segments.append(jnp.ones(x.shape[:2], jnp.int32))
      modalities += [MODALITIES.index('image')] * x.shape[1]
    if 'tokens' in batch:
      x = self.text_embedding(batch['tokens'])
      parts.append(self.text_positions.embed(x, jnp.arange(x.shape[1])))
      segments.append(jnp.where(batch['segments'] > 0, 2, 0))
      modalities += [MODALITIES.index('text')] * x.shape[1]
    x, segments = jnp.concatenate(parts, axis=1), jnp.concatenate(segments, axis=1)
    if 'valid' in batch:
      segments = jnp.where(batch['valid'][:, None], segments, 0)
    modalities = jnp.broadcast_to(jnp.array(modalities, jnp.int32), segments.shape)

    context = Context(RouterInputs(valid=segments > 0, modalities=modalities), PositionEncoding(),
                      mask=Mask(segments, segments))
    encoded = self.transformer(x, context, key=key, train=train)
    x, routers = encoded.x, encoded.routers

    pooled, extras = {}, {}
    for number, (name, head) in enumerate(zip(MODALITIES, (self.image_head, self.text_head))):
      if name == 'image' and 'image' in batch or name == 'text' and 'tokens' in batch:
        pooled[name] = masked_mean(x, (modalities == number) & (segments > 0))
        extras[name] = unit(head(pooled[name], jnp.float32))
    logits = jnp.zeros((0, 0), jnp.float32)
    if len(extras) == 2:
      logits = jnp.exp(self.log_scale[...]) * jnp.einsum('ie,te->it', extras['image'], extras['text'],
                                                         precision=jax.lax.Precision.HIGHEST)
      routers = {depth: with_success(router, modalities, segments > 0) for depth, router in routers.items()}
    return ModelOutput(logits, next(iter(pooled.values())), routers, encoded.updates, extras)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """<float>[B,S,D], <bool>[B,S] -> <float>[B,D]: mean over the tokens in the mask, 0 if there are none."""
  total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1, dtype=jnp.float32)
  return (total / jnp.maximum(mask.sum(1, keepdims=True), 1)).astype(x.dtype)


def unit(x: jax.Array) -> jax.Array:
  """<float32>[...,D] scaled to length 1; zero vectors stay zero."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny))


def with_success(router: RouterOutput, modalities: jax.Array, valid: jax.Array) -> RouterOutput:
  """`router` with the metrics `<modality>_success`: the share of a modality's tokens computed by at least one expert.

  Args:
    router: with a plan over any grouping of the tokens.
    modalities: <int32>[B,S].
    valid: <bool>[B,S].
  """
  computed = (router.plan.shares().sum(-1) > 0).reshape(valid.shape)
  rates = {}
  for number, name in enumerate(MODALITIES):
    members = valid & (modalities == number)
    rates[f'{name}_success'] = jnp.sum(members & computed) / jnp.maximum(members.sum(), 1)
  return dataclasses.replace(router, metrics={**router.metrics, **rates})
