"""Attention: multi-head, grouped-query and cross, with any position encoding.

Axis letters: B batch, S queries, T keys, H heads, N heads of keys and values, D width.
"""
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax import functional
from moejax.config import ConfigError, config_path
from moejax.layers import attend, initializers
from moejax.layers.attend import Mask
from moejax.layers.mixers import kv_cache
from moejax.layers.norms import NORMS
from moejax.layers.positions import PositionEncoding
from moejax.layers.sublayer import SUBLAYERS, Axes, Cache, Context, Left, Sublayer
from moejax.parallel import rules
from moejax.random import dropout as drop
from moejax.ranges import Count, Divides, Positive, Rate

Projection = Literal['query', 'key', 'value', 'out']


class Attention(Sublayer):
  """Scaled dot-product attention with projections.

  Config keys:
    heads: H.
    kv_heads: N heads of keys and values, each shared by H/N query heads (2305.13245); H by default.
    head_dim: D/H by default.
    use_bias: whether projections add a bias, or the names of the ones that do, e.g. ('query', 'key', 'value') in Qwen2.
    qk_norm: norm of queries and keys, e.g. `dict(name='layer_norm', use_bias=False)` (2302.05442), or None.
    qk_norm_of: what it normalises: each 'head', or 'all_heads' together (OLMoE, 2409.02060).
    scale: 'sqrt' divides logits by sqrt(head_dim); 'none' initialises the query kernel smaller by that factor (T5).
    cap: logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118); None: no cap.
    sinks: whether each head has a learned logit that takes part in the softmax and has no value (gpt-oss).
    window: in self-attention a token sees itself and the window - 1 tokens before it (2310.06825), and as many after it
      where attention is bidirectional; None: all.
    dropout: on the attention weights.
    init: initialisation of the projections.
    implementation: see `attend.choice`; None: by platform and sizes.
  """

  def __init__(self, *, dim: int, dtype: jnp.dtype, rngs: nnx.Rngs, heads: Count,
               kv_heads: Annotated[Count, Divides('heads')] | None = None, head_dim: Count | None = None,
               use_bias: bool | tuple[Projection, ...] = False, qk_norm: Mapping | None = None,
               qk_norm_of: Literal['head', 'all_heads'] = 'head', scale: Literal['sqrt', 'none'] = 'sqrt',
               cap: Positive | None = None, sinks: bool = False, window: Count | None = None, dropout: Rate = 0.,
               init: Mapping = dict(name='fan_in'), implementation: attend.Name | None = None):
    kv_heads = heads if kv_heads is None else kv_heads
    if head_dim is None and dim % heads:
      raise ConfigError(f'.heads = {heads} does not divide the model width {dim}: use a divisor, or set head_dim.')
    head_dim = head_dim or dim // heads
    self.heads, self.kv_heads, self.head_dim, self.dropout, self.dtype = heads, kv_heads, head_dim, dropout, dtype
    self.scale, self.cap, self.qk_norm_of = head_dim ** -0.5 if scale == 'sqrt' else 1., cap, qk_norm_of
    self.window, self.where = window, config_path()
    self.implementation: attend.Name | None = implementation

    project = initializers.build(init, '.init', in_axis=0, out_axis=(1, 2))
    smaller = lambda *args: project(*args) * (head_dim ** -0.5 / self.scale)
    merge = initializers.build(init, '.init', in_axis=(0, 1), out_axis=2)
    query, key = (dim, heads, head_dim), (dim, kv_heads, head_dim)
    query_axes, key_axes = ('embed', 'heads', 'head_dim'), ('embed', 'kv_heads', 'head_dim')
    self.query = functional.parameter(rngs, smaller, query, query_axes)
    self.key = functional.parameter(rngs, project, key, key_axes)
    self.value = functional.parameter(rngs, project, key, key_axes)
    self.out = functional.parameter(rngs, merge, (heads, head_dim, dim), ('heads', 'head_dim', 'embed'))

    def bias(name: Projection, shape, axes):
      has_bias = use_bias if isinstance(use_bias, bool) else name in use_bias
      return functional.parameter(rngs, nnx.initializers.zeros, shape, axes) if has_bias else None

    self.query_bias = bias('query', query[1:], query_axes[1:])
    self.key_bias = bias('key', key[1:], key_axes[1:])
    self.value_bias = bias('value', key[1:], key_axes[1:])
    self.out_bias = bias('out', (dim,), ('embed',))

    def norm(count: int, axis: str):
      size, axis = (head_dim, 'head_dim') if qk_norm_of == 'head' else (count * head_dim, axis)
      return None if qk_norm is None else NORMS.build(qk_norm, '.qk_norm', dim=size, axis=axis, rngs=rngs)

    self.query_norm, self.key_norm = norm(heads, 'heads'), norm(kv_heads, 'kv_heads')
    self.sinks = functional.parameter(rngs, nnx.initializers.zeros, (heads,), ('heads',)) if sinks else None

  def read(self, x: Float[Array, 'B S D'], memory: Float[Array, 'B T D'] | None = None, *, mask: Mask | None = None,
           bias: Float[Array, '#B #H S T'] | None = None, encoding: PositionEncoding | None = None,
           positions: Int[Array, 'B S'] | None = None, key: jax.Array | None = None,
           train: bool = False) -> Float[Array, 'B S D']:
    """Attends from `x` to `memory`, or to `x`.

    Args:
      x: <float>[B,S,D].
      memory: <float>[B,T,D], or None for self-attention.
      mask: which keys a query sees; None: all.
      bias: <float>[B|1,1|H,S,T], added to the logits.
      encoding: rotates queries and keys by their positions <int32>[B,S]; self-attention only.
      key: for dropout.
      train: whether to apply dropout.

    Returns:
      <float>[B,S,D].
    """
    queries = self.queries(x, encoding, positions)
    keys, values = self.keys_and_values(x if memory is None else memory, encoding, positions)
    return self.weigh(queries, keys, values, mask=mask, bias=bias, key=key, train=train)

  def queries(self, x: Float[Array, 'B S D'], encoding: PositionEncoding | None = None,
              positions: Int[Array, 'B S'] | None = None) -> Float[Array, 'B S H k']:
    """x: <float>[B,S,D] -> <float>[B,S,H,head_dim], rotated by `encoding` at positions <int32>[B,S]."""
    queries = self._normed(self._project('bsd,dhk->bshk', x, self.query, self.query_bias), self.query_norm)
    queries = queries if encoding is None else encoding.rotate(queries, positions)
    return rules.constrain(queries, ('batch', 'length', 'heads', 'head_dim'))

  def keys_and_values(
      self, x: Float[Array, 'B T D'], encoding: PositionEncoding | None = None,
      positions: Int[Array, 'B T'] | None = None) -> tuple[Float[Array, 'B T N k'], Float[Array, 'B T N k']]:
    """x: <float>[B,T,D] -> two of <float>[B,T,N,head_dim]; see `queries`."""
    keys = self._normed(self._project('btd,dnk->btnk', x, self.key, self.key_bias), self.key_norm)
    values = self._project('btd,dnk->btnk', x, self.value, self.value_bias)
    keys = keys if encoding is None else encoding.rotate(keys, positions)
    axes = ('batch', 'length', 'kv_heads', 'head_dim')
    return rules.constrain(keys, axes), rules.constrain(values, axes)

  def weigh(self, queries: Float[Array, 'B S H k'], keys: Float[Array, 'B T N k'],
            values: Float[Array, 'B T N k'], *, mask: Mask | None = None,
            bias: Float[Array, '#B #H S T'] | None = None, key: jax.Array | None = None,
            train: bool = False) -> Float[Array, 'B S D']:
    """What `queries` and `keys_and_values` return -> <float>[B,S,D].

    Args:
      queries, keys, values: <float>[B,S,H,head_dim], <float>[B,T,N,head_dim] twice.
      mask: which keys a query sees.
      bias: <float>[B|1,1|H,S,T], added to the logits.
      key: for dropout.
      train: whether to apply dropout.
    """
    dropped = lambda weights: drop(weights, self.dropout, key=key, train=train)
    attended = attend.attend(queries, keys, values, scale=self.scale, mask=mask, bias=bias, cap=self.cap,
                             sinks=None if self.sinks is None else self.sinks[...],
                             drop=dropped if train and self.dropout else None, implementation=self.implementation)
    return self._project('bshk,hkd->bsd', attended, self.out, self.out_bias)

  def _normed(self, x: jax.Array, norm) -> jax.Array:
    if norm is None:
      return x
    return norm(x) if self.qk_norm_of == 'head' else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

  def _project(self, equation, x, kernel, bias):
    y = jnp.einsum(equation, x.astype(self.dtype), kernel[...].astype(self.dtype))
    return y if bias is None else y + bias[...].astype(self.dtype)


@SUBLAYERS('attention')
class SelfAttention(Attention):
  """Attention within a sequence, which may remember the keys and values of earlier tokens."""

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: Cache | None = None, *,
               key: jax.Array | None = None, train: bool = False) -> tuple[Float[Array, 'B S D'], Left]:
    """x: <float>[B,S,D] -> <float>[B,S,D], with the mask, bias and positions of the context."""
    mask = (context.mask or Mask()).with_window(self.window)
    encoding, positions = context.encoding, context.inputs.positions
    if cache is None:
      return self.read(x, mask=mask, bias=context.bias, encoding=encoding, positions=positions, key=key,
                       train=train), Left()
    queries = self.queries(x, encoding, positions)
    if mask.query_positions is None or mask.query_segments is None:
      raise ValueError('Attention with a cache needs a mask with the places and the segments of the new tokens.')
    keys, values = self.keys_and_values(x, encoding, positions)
    new = dict(keys=keys, values=values, places=mask.query_positions, segments=mask.query_segments)
    seen, cache = kv_cache.append(cache, new, self.window)
    mask = dataclasses.replace(mask, key_positions=seen['places'], key_segments=seen['segments'])
    bias = encoding.bias_between(new['places'], seen['places'])
    y = self.weigh(queries, seen['keys'], seen['values'], mask=mask, bias=bias, key=key, train=train)
    return y, Left(cache=cache)

  def init_cache(self, batch: int, length: int) -> Cache:
    """Room for `length` tokens, or for the window."""
    slots = length if self.window is None else min(length, self.window)
    return kv_cache.empty((batch, slots, self.kv_heads, self.head_dim), self.dtype)

  def cache_axes(self) -> Axes:
    """See `Sublayer.cache_axes`."""
    return kv_cache.AXES


@SUBLAYERS('cross_attention')
class CrossAttention(Attention):
  """Attention to the memory of the context, without positions.

  Its cache is the keys and values of the memory: a call that has a memory makes them, the calls after it have none.
  """

  reads_memory = True

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: Cache | None = None, *,
               key: jax.Array | None = None, train: bool = False) -> tuple[Float[Array, 'B S D'], Left]:
    """x: <float>[B,S,D] -> <float>[B,S,D]. Raises ConfigError: there is nothing to attend to."""
    queries = self.queries(x)
    if context.memory is not None:
      keys, values = self.keys_and_values(context.memory)
      left = Left() if cache is None else Left(cache=dict(keys=keys, values=values))
    elif cache is not None and cache['keys'].shape[1]:
      keys, values, left = cache['keys'], cache['values'], Left()
    else:
      raise ConfigError(f"{self.where}: cross-attention needs the output of an encoder, which this model does not have. "
                        "Use config.model.name = 'encoder_decoder', or name = 'attention' here.")
    return self.weigh(queries, keys, values, mask=context.memory_mask, key=key, train=train), left

  def init_cache(self, batch: int, length: int) -> Cache:
    """Room for the keys and values of a memory of `length` tokens."""
    shape = (batch, length, self.kv_heads, self.head_dim)
    return dict(keys=jnp.zeros(shape, self.dtype), values=jnp.zeros(shape, self.dtype))

  def cache_axes(self) -> Axes:
    """See `Sublayer.cache_axes`."""
    return dict.fromkeys(('keys', 'values'), ('batch', 'length', 'kv_heads', 'head_dim'))
