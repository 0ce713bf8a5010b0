"""Attention: multi-head, grouped-query and cross, with any position encoding.

Axis letters: B batch, S queries, T keys, H heads, N heads of keys and values, D width.
"""
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import ConfigError
from moejax.layers import initializers
from moejax.layers.dropout import dropout as drop
from moejax.layers.norms import NORMS
from moejax.layers.positions import PositionEncoding
from moejax.layers.sublayer import SUBLAYERS, Cache, Context, Left, Sublayer
from moejax.parallel import rules
from moejax.ranges import Count, Divides, Rate


class Attention(Sublayer):
  """Scaled dot-product attention with projections.

  Config keys:
    heads: H.
    kv_heads: N heads of keys and values, each shared by H/N query heads (2305.13245); H by default.
    head_dim: D/H by default.
    use_bias: whether the projections add a bias.
    qk_norm: norm of each query and key head, e.g. `dict(name='layer_norm', use_bias=False)` (2302.05442), or None.
    scale: 'sqrt' divides logits by sqrt(head_dim); 'none' initialises the query kernel smaller by that factor (T5).
    dropout: on the attention weights.
    init: initialisation of the projections.
  """

  def __init__(self, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, heads: Count,
               kv_heads: Annotated[Count, Divides('heads')] | None = None, head_dim: Count | None = None,
               use_bias: bool = False, qk_norm: Mapping | None = None, scale: Literal['sqrt', 'none'] = 'sqrt',
               dropout: Rate = 0., init: Mapping = dict(name='fan_in')):
    kv_heads = heads if kv_heads is None else kv_heads
    if head_dim is None and dim % heads:
      raise ConfigError(f'.heads = {heads} does not divide the model width {dim}: use a divisor, or set '
                        'head_dim.')
    head_dim = head_dim or dim // heads
    self.heads, self.kv_heads, self.dropout, self.dtype = heads, kv_heads, dropout, dtype
    self.scale = head_dim ** -0.5 if scale == 'sqrt' else 1.

    project = initializers.build(init, '.init', in_axis=0, out_axis=(1, 2))
    smaller = lambda *args: project(*args) * (head_dim ** -0.5 / self.scale)
    merge = initializers.build(init, '.init', in_axis=(0, 1), out_axis=2)
    query, key = (dim, heads, head_dim), (dim, kv_heads, head_dim)
    query_axes, key_axes = ('embed', 'heads', 'head_dim'), ('embed', 'kv_heads', 'head_dim')
    self.query = functional.parameter(rngs, smaller, query, query_axes)
    self.key = functional.parameter(rngs, project, key, key_axes)
    self.value = functional.parameter(rngs, project, key, key_axes)
    self.out = functional.parameter(rngs, merge, (heads, head_dim, dim), ('heads', 'head_dim', 'embed'))

    zeros = lambda shape, axes: functional.parameter(rngs, nnx.initializers.zeros, shape, axes) if use_bias else None
    self.query_bias = zeros(query[1:], query_axes[1:])
    self.key_bias = zeros(key[1:], key_axes[1:])
    self.value_bias = zeros(key[1:], key_axes[1:])
    self.out_bias = zeros((dim,), ('embed',))

    norm = lambda: None if qk_norm is None else NORMS.build(qk_norm, '.qk_norm', dim=head_dim, axis='head_dim', rngs=rngs)
    self.query_norm, self.key_norm = norm(), norm()

  def attend(self, x: jax.Array, memory: jax.Array | None = None, *, mask: jax.Array | None = None,
             bias: jax.Array | None = None, encoding: PositionEncoding | None = None,
             positions: jax.Array | None = None, key: jax.Array | None = None, train: bool = False) -> jax.Array:
    """Attends from `x` to `memory`, or to `x`.

    Args:
      x: <float>[B,S,D].
      memory: <float>[B,T,D], or None for self-attention.
      mask: <bool>[B|1,1|H,S,T], True where a query may attend to a key.
      bias: <float>[B|1,1|H,S,T], added to the logits.
      encoding: rotates queries and keys by their positions <int32>[B,S]; self-attention only.
      key: for dropout.
      train: whether to apply dropout.

    Returns:
      <float>[B,S,D].
    """
    memory = x if memory is None else memory
    queries = self._project('bsd,dhk->bshk', x, self.query, self.query_bias)
    keys = self._project('btd,dnk->btnk', memory, self.key, self.key_bias)
    values = self._project('btd,dnk->btnk', memory, self.value, self.value_bias)
    if self.query_norm is not None and self.key_norm is not None:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    if encoding is not None:
      queries, keys = encoding.rotate(queries, positions), encoding.rotate(keys, positions)
    queries = rules.constrain(queries, ('batch', 'length', 'heads', 'head_dim'))
    keys = rules.constrain(keys, ('batch', 'length', 'kv_heads', 'head_dim'))
    values = rules.constrain(values, ('batch', 'length', 'kv_heads', 'head_dim'))

    attended = attend(queries, keys, values, self.scale, mask, bias,
                      lambda weights: drop(weights, self.dropout, key=key, train=train))
    return self._project('bshk,hkd->bsd', attended, self.out, self.out_bias)

  def _project(self, equation, x, kernel, bias):
    y = jnp.einsum(equation, x.astype(self.dtype), kernel[...].astype(self.dtype))
    return y if bias is None else y + bias[...].astype(self.dtype)


@SUBLAYERS('attention')
class SelfAttention(Attention):
  """Attention within a sequence."""

  def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None, *, key: jax.Array | None = None,
               train: bool = False) -> tuple[jax.Array, Left]:
    """x: <float>[B,S,D] -> <float>[B,S,D], with the mask, bias and positions of the context."""
    return self.attend(x, mask=context.mask, bias=context.bias, encoding=context.encoding,
                       positions=context.inputs.positions, key=key, train=train), Left()


@SUBLAYERS('cross_attention')
class CrossAttention(Attention):
  """Attention to the memory of the context, without positions."""

  def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None, *, key: jax.Array | None = None,
               train: bool = False) -> tuple[jax.Array, Left]:
    """x: <float>[B,S,D] -> <float>[B,S,D]."""
    return self.attend(x, context.memory, mask=context.memory_mask, key=key, train=train), Left()


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, scale: float, mask: jax.Array | None = None,
           bias: jax.Array | None = None, drop=lambda weights: weights) -> jax.Array:
  """Softmax attention; logits and weights are float32.

  queries: <float>[B,S,H,k]; keys, values: <float>[B,T,N,k], where N divides H: head h reads head h // (H/N);
  mask, bias: [B|1,1|H,S,T] -> <float>[B,S,H,k]. A fully masked query attends to all keys equally, to avoid NaN.
  """
  batch, length, heads, _ = queries.shape
  kv_heads = keys.shape[2]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, -1)
  logits = jnp.einsum('bsnrk,btnk->bnrst', grouped, keys, preferred_element_type=jnp.float32)
  logits = logits.reshape(batch, heads, length, -1) * scale
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = drop(jax.nn.softmax(logits)).astype(values.dtype)
  weights = weights.reshape(batch, kv_heads, heads // kv_heads, length, -1)
  return jnp.einsum('bnrst,btnk->bsnrk', weights, values).reshape(queries.shape[:-1] + values.shape[-1:])


def attention_mask(query_segments: jax.Array, key_segments: jax.Array, causal: bool) -> jax.Array:
  """<int32>[B,S], <int32>[B,T] -> <bool>[B,1,S,T]: True within a segment, and for earlier or equal keys if `causal`.

  Padding is segment 0: it attends only to padding, and nothing else attends to it.
  """
  mask = query_segments[:, :, None] == key_segments[:, None, :]
  if causal:
    mask = mask & jnp.tril(jnp.ones(mask.shape[1:], bool))
  return mask[:, None]
