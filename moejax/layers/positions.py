"""Position encodings, all behind one interface.

A position encoding can act in three places; each kind uses one of them:

    embed    added to the embeddings            learned, sincos2d
    rotate   applied to queries and keys        rope
    bias     added to the attention logits      relative_bias
"""
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from moejax import functional
from moejax.config import ConfigError, Registry, config_path
from moejax.layers import rotary
from moejax.ranges import Above, AtLeast, AtMost, Between, Count, NonNegative

Base = Annotated[float, AtLeast(1)]


def position_encoding(config: Mapping, where: str, *, grid: tuple[int, int] | None = None, prefix: int = 0,
                      **context: Any) -> 'PositionEncoding':
  """Builds the encoding named in `config`. `grid` and `prefix` are for tokens that are image patches."""
  return POSITIONS.build(config, where, grid=grid, prefix=prefix, **context)


class PositionEncoding(nnx.Module):
  """Base class of position encodings. By default they do nothing."""

  def embed(self, x: Float[Array, 'B S D'], positions: Int[Array, 'B S']) -> Float[Array, 'B S D']:
    """x: <float>[B,S,D] embeddings at positions <int32>[B,S]."""
    return x

  def rotate(self, x: Float[Array, 'B S H k'],
             positions: Int[Array, 'B S'] | None) -> Float[Array, 'B S H k']:
    """x: <float>[B,S,H,head_dim] queries or keys at positions <int32>[B,S]."""
    return x

  def bias(self, queries: int, keys: int) -> Float32[Array, '1 H S T'] | None:
    """<float32>[1,H,queries,keys] to add to the logits of attention within a sequence, or None."""
    return None

  def bias_between(self, queries: Int[Array, 'B S'], keys: Int[Array, 'B T']) -> Float32[Array, 'B H S T'] | None:
    """`bias` for tokens at places <int32>[B,S] and <int32>[B,T] in their rows: <float32>[B,H,S,T], or None."""
    return None


POSITIONS = Registry('position encoding', PositionEncoding,
                     context=('grid', 'prefix', 'length', 'dim', 'heads', 'bidirectional', 'rngs'))


@POSITIONS('none')
class NoPositions(PositionEncoding):
  """No position information."""

  def __init__(self):
    pass


@POSITIONS('learned')
class Learned(PositionEncoding):
  """A learned vector for each of `length` positions. Longer sequences raise ConfigError while tracing.

  Config:
    length: number of positions.
    init_std: initial standard deviation.
  """

  def __init__(self, *, dim: int, rngs: nnx.Rngs, length: Count, init_std: NonNegative = 0.02):
    self.where, self.length = config_path(), length
    self.table = functional.parameter(rngs, nnx.initializers.normal(init_std), (length, dim), (None, 'embed'))

  def embed(self, x, positions):
    if x.shape[1] > self.length:
      raise ConfigError(f'{self.where}.length = {self.length} is less than the sequence length {x.shape[1]}. Raise it, '
                        'or shorten the data.')
    return x + self.table[...].astype(x.dtype)[positions]


@POSITIONS('sincos2d')
class Sincos2d(PositionEncoding):
  """Sines and cosines of a patch's row and column, with D/4 frequencies each (MoCo v3, 2104.02057).

  `grid` is (rows, columns), in row-major order after `prefix` tokens without a position in the image.

  Config:
    temperature: largest wavelength divided by 2 pi.
  """

  def __init__(self, *, dim: int, grid: tuple | None, prefix: int, temperature: Base = 10000.):
    if grid is None:
      raise ConfigError(': sincos2d is for image patches, which this model does not have. Choose another '
                        'position encoding.')
    if dim % 4 or dim < 8:
      raise ConfigError(f': sincos2d needs a model width that is a multiple of 4 and at least 8, not {dim}.')
    self.grid, self.prefix, self.temperature = grid, prefix, temperature

  def embed(self, x, positions):
    quarter = x.shape[-1] // 4
    frequencies = self.temperature ** -(np.arange(quarter) / (quarter - 1))
    angles = [np.arange(size)[:, None] * frequencies for size in self.grid]
    rows, columns = (jnp.asarray(np.concatenate([np.sin(a), np.cos(a)], axis=-1), x.dtype) for a in angles)
    waves = [jnp.broadcast_to(axis, (*self.grid, 2 * quarter)) for axis in (columns, rows[:, None])]
    table = jnp.concatenate(waves, axis=-1).reshape(-1, x.shape[-1])
    return x + jnp.pad(table, ((self.prefix, 0), (0, 0)))[positions]


@POSITIONS('rope')
class Rope(PositionEncoding):
  """Rotates pairs of features by angles proportional to the position (RoFormer, 2104.09864).

  Config:
    theta: base of the angles; the slowest pair rotates once in about 2 pi theta positions.
    fraction: the share of a head's features, the first ones, that are rotated: rotary_pct of GPT-NeoX,
      partial_rotary_factor of Phi.
    layout: which features are a pair: 'half' i and i + half of the rotated ones, the convention of Llama and GPT-NeoX
      checkpoints in transformers; 'interleaved' 2i and 2i + 1, that of RoFormer, GPT-J and Meta's own Llama checkpoints.
    scaling: frequencies for contexts longer than those of pretraining, e.g. `dict(name='linear', factor=4.)`; None: as
      they are.
  """

  def __init__(self, *, theta: Base = 10000., fraction: Annotated[float, Above(0), AtMost(1)] = 1.,
               layout: rotary.Layout = 'half', scaling: Mapping | None = None):
    self.where, self.theta, self.fraction = config_path(), theta, fraction
    self.layout: rotary.Layout = layout
    self.scaling: rotary.RopeScaling | None = None
    if scaling is not None:
      if theta == 1:
        raise ConfigError('.theta = 1 gives all pairs one frequency, which cannot be scaled. Raise it.')
      self.scaling = rotary.SCALINGS.build(scaling, '.scaling')

  def rotate(self, x: Float[Array, 'B S H k'],
             positions: Any) -> Float[Array, 'B S H k']:
    width = int(x.shape[-1] * self.fraction)
    if width % 2 or not width:
      of = '' if self.fraction == 1 else f' (fraction {self.fraction} of {x.shape[-1]})'
      raise ConfigError(f'{self.where}: rotary positions pair features, so head_dim must be even, not {width}{of}. '
                        'Set attention.head_dim, or choose another position encoding.')
    if self.scaling is None:
      return rotary.rotate(x, positions, rotary.rope_frequencies(self.theta, width), self.layout)
    frequencies = jnp.asarray(self.scaling.frequencies(self.theta, width), jnp.float32)
    return rotary.rotate(x, positions, frequencies, self.layout, self.scaling.amplitude)


@POSITIONS('relative_bias')
class RelativeBias(PositionEncoding):
  """A learned bias per head and bucket of distances, shared by all layers of a stack (T5, 1910.10683).

  Config:
    buckets: number of buckets of distances, half for each direction if attention is bidirectional.
    max_distance: distances from this on share a bucket.
  """

  def __init__(self, *, heads: int, dim: int, bidirectional: bool, rngs: nnx.Rngs,
               buckets: Annotated[int, Between(4, 4096)] = 32, max_distance: Count = 128):
    exact = buckets // (4 if bidirectional else 2)  # distances with a bucket of their own
    if max_distance <= exact:
      raise ConfigError(f'.max_distance must be above {exact}, not {max_distance}: with {buckets} buckets, '
                        'smaller distances have one each. Raise it, or lower buckets.')
    self.bidirectional, self.buckets, self.max_distance = bidirectional, buckets, max_distance
    init = nnx.initializers.normal(dim ** -0.5)
    self.table = functional.parameter(rngs, init, (buckets, heads), (None, 'heads'))

  def bias(self, queries, keys):
    # Documents packed into one row are masked from one another, so differences of indices equal those of positions.
    distances = np.arange(1 - queries, keys)
    buckets = jnp.asarray(relative_position_bucket(distances, self.bidirectional, self.buckets, self.max_distance))
    which = jnp.arange(keys) - jnp.arange(queries)[:, None] + queries - 1
    return jnp.moveaxis(self.table[...][buckets[which]], -1, 0)[None]

  def bias_between(self, queries, keys):
    most = self.max_distance  # larger distances share its bucket
    buckets = jnp.asarray(relative_position_bucket(np.arange(-most, most + 1), self.bidirectional, self.buckets, most))
    which = jnp.clip(keys[:, None, :] - queries[:, :, None], -most, most) + most
    return jnp.moveaxis(self.table[...][buckets[which]], -1, 1)


def relative_position_bucket(distance: np.ndarray, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
  """Bucket of each `distance` = key position - query position: <int>[...] -> <int>[...] in [0, buckets).

  Bidirectional attention gives half of the buckets to each side; otherwise keys ahead count as distance 0. On each side
  the first half of the buckets holds one distance each, the second half larger distances on a logarithmic scale up to
  `max_distance`; the last bucket also holds those beyond. Computed in float32 like the published implementations, whose
  rounding determines the bucket boundaries.
  """
  if bidirectional:
    buckets //= 2
    offset = np.where(distance > 0, buckets, 0)
    distance = np.abs(distance)
  else:
    offset = 0
    distance = np.maximum(-distance, 0)
  exact = buckets // 2
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / math.log(max_distance / exact)
  logarithmic = exact + (ratio * (buckets - exact)).astype(np.int32)
  return offset + np.where(distance < exact, distance, np.minimum(logarithmic, buckets - 1))
