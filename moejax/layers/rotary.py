"""Rotary positions: the rotation of pairs of features, and how fast each pair turns.

A model that is to read more than it was trained on has its frequencies scaled. A scaling knows from its config how long
the sequences are, never from the batch: else later tokens, and other rows, would turn earlier ones, which a cache has
turned already.

Axis letters: B batch, S tokens, H heads, r rotated features of a head.
"""
import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int
import numpy as np

from moejax.config import ConfigError, Registry, config_path
from moejax.ranges import AtLeast, Count, Positive

Factor = Annotated[float, AtLeast(1)]
Layout = Literal['half', 'interleaved']


def rotate(x: Float[Array, 'B S H head_dim'], positions: Int[Array, 'B S'], frequencies: Float32[Array, 'pairs'],
           layout: Layout = 'half', attention_factor: float = 1.) -> Float[Array, 'B S H head_dim']:
  """Turns pairs of the first r features of each head by position times frequency; the others stay as they are.

  Args:
    x: <float>[B,S,H,head_dim].
    positions: <int32>[B,S].
    frequencies: <float32>[r/2], in radians per position.
    layout: of r features, 'half' pairs i with i + r/2, 'interleaved' 2i with 2i + 1.
    attention_factor: by which turned features grow.

  Returns:
    <float>[B,S,H,head_dim]; angles are float32.
  """
  half = frequencies.shape[0]
  angle = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if attention_factor != 1:
    cos, sin = cos * attention_factor, sin * attention_factor
  turned, rest = x[..., :2 * half].astype(jnp.float32), x[..., 2 * half:]
  if layout == 'half':
    first, second = turned[..., :half], turned[..., half:]
  else:
    first, second = turned[..., ::2], turned[..., 1::2]
  both = first * cos - second * sin, second * cos + first * sin
  turned = jnp.concatenate(both, axis=-1) if layout == 'half' else jnp.stack(both, axis=-1).reshape(turned.shape)
  turned = turned.astype(x.dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def rope_frequencies(theta: float, width: int) -> Float32[Array, 'pairs']:
  """<float32>[width/2], theta^(-2i/width) (RoFormer, 2104.09864, equation 15)."""
  half = width // 2
  return theta ** -(jnp.arange(half, dtype=jnp.float32) / half)


class RopeScaling:
  """Frequencies for contexts longer than those of pretraining; the base class."""

  @property
  def amplitude(self) -> float:
    """The factor of queries and of keys; logits grow by its square."""
    return 1.

  def frequencies(self, theta: float, width: int) -> np.ndarray:
    """<float64>[width/2], in radians per position, for `width` rotated features."""
    raise NotImplementedError


SCALINGS: Registry[RopeScaling] = Registry('rope scaling', RopeScaling)


def _unscaled(theta, width):
  return theta ** -(np.arange(0, width, 2) / width)


@SCALINGS('linear')
@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
  """Positions divided by a factor (position interpolation, 2306.15595).

  Attributes:
    factor: by which the context is longer than in pretraining.
  """
  factor: Factor

  def frequencies(self, theta, width):
    return _unscaled(theta, width) / self.factor


@SCALINGS('dynamic_ntk')
@dataclasses.dataclass(frozen=True)
class NtkScaling(RopeScaling):
  """A larger theta, which leaves fast pairs as they are and slows the slowest ("dynamic NTK").

  For a length L and the original length O, theta becomes theta * (factor * L/O - (factor - 1))^(width / (width - 2)).

  Attributes:
    factor: by which the context is longer than in pretraining.
    original_length: tokens of a sequence in pretraining.
    length: tokens of the longest sequence to be read; None: factor times original_length.
  """
  factor: Factor
  original_length: Count
  length: Count | None = None

  def frequencies(self, theta, width):
    if width < 4:
      raise ConfigError(f"Rope scaling 'dynamic_ntk' needs at least 4 rotated features, not {width}: the slowest of "
                        'several pairs is what it is made for. Raise head_dim or fraction.')
    length = self.factor * self.original_length if self.length is None else self.length
    stretch = self.factor * max(length, self.original_length) / self.original_length - (self.factor - 1)
    return _unscaled(theta * stretch ** (width / (width - 2)), width)


@SCALINGS('yarn')
@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
  """Slow pairs turn `factor` times slower, fast ones as before, those between by a ramp (YaRN, 2309.00071).

  Attributes:
    factor: by which the context is longer than in pretraining.
    original_length: tokens of a sequence in pretraining.
    beta_fast: pairs that turn this often in the original length, or more, keep their frequency.
    beta_slow: pairs that turn this often in the original length, or less, are slowed by the whole factor.
    truncate: whether the ramp begins and ends at whole pairs; gpt-oss has False.
    attention_factor: factor of queries and of keys; None: 0.1 log(factor) + 1 (section 3.4), or by `mscale`.
    mscale, mscale_all_dim: of DeepSeek; where both are given, `yarn_mscale` of the one divided by that of the other. By
      that of `mscale_all_dim`, squared, DeepSeek's attention multiplies its logits in addition.
  """
  factor: Factor
  original_length: Count
  beta_fast: Positive = 32.
  beta_slow: Positive = 1.
  truncate: bool = True
  attention_factor: Positive | None = None
  mscale: Positive | None = None
  mscale_all_dim: Positive | None = None

  @property
  def amplitude(self):
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale is not None and self.mscale_all_dim is not None:
      return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
    return yarn_mscale(self.factor)

  def frequencies(self, theta, width):
    # The pair, as a real number, that turns so often in the original length; its frequency is theta^(-2 pair / width).
    pair = lambda turns: width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    first, last = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last if last != first else first + 0.001
    slowed = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    return _unscaled(theta, width) * (slowed / self.factor + 1 - slowed)


def yarn_mscale(factor: float, mscale: float = 1.) -> float:
  """0.1 mscale log(factor) + 1: by how much queries and keys grow, to sharpen attention over a longer context."""
  return 0.1 * mscale * math.log(factor) + 1


@SCALINGS('llama3')
@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
  """Long waves are stretched by `factor`, short ones stay, those between by a ramp in the frequency (Llama 3.1).

  Attributes:
    factor: by which the context is longer than in pretraining.
    original_length: tokens of a sequence in pretraining.
    low_freq_factor: pairs that turn this often in the original length, or less, are slowed by the whole factor.
    high_freq_factor: pairs that turn this often in the original length, or more, keep their frequency.
  """
  factor: Factor
  original_length: Count
  low_freq_factor: Positive = 1.
  high_freq_factor: Positive = 4.

  def __post_init__(self):
    if self.high_freq_factor <= self.low_freq_factor:
      raise ConfigError(f'.high_freq_factor = {self.high_freq_factor} must be above low_freq_factor = '
                        f'{self.low_freq_factor}: fast pairs keep their frequency.')

  def frequencies(self, theta, width):
    unscaled = _unscaled(theta, width)
    turns = self.original_length * unscaled / (2 * math.pi)
    kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
    return unscaled * ((1 - kept) / self.factor + kept)


@SCALINGS('longrope')
@dataclasses.dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
  """Each pair is slowed by a factor of its own, found by search (LongRoPE, 2402.13753; Phi-3).

  Attributes:
    factor: by which the context is longer than in pretraining: max_position_embeddings by the original ones in configs
      of transformers.
    original_length: tokens of a sequence in pretraining.
    short_factor: divisors of the frequencies, one a pair, for sequences up to the original length.
    long_factor: divisors of the frequencies, one a pair, for longer ones.
    length: tokens of the longest sequence to be read, which selects between the two; None: factor times original_length.
    attention_factor: factor of queries and of keys; None: sqrt(1 + log(factor) / log(original_length)).
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  factor: Factor
  original_length: Annotated[int, AtLeast(2)]
  short_factor: Sequence[Positive]
  long_factor: Sequence[Positive]
  length: Count | None = None
  attention_factor: Positive | None = None

  def __post_init__(self):
    object.__setattr__(self, 'short_factor', tuple(self.short_factor))
    object.__setattr__(self, 'long_factor', tuple(self.long_factor))

  @property
  def amplitude(self):
    if self.attention_factor is not None:
      return self.attention_factor
    return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

  def frequencies(self, theta, width):
    length = self.factor * self.original_length if self.length is None else self.length
    name = 'long_factor' if length > self.original_length else 'short_factor'
    divisors = getattr(self, name)
    if len(divisors) != width // 2:
      raise ConfigError(f'{self.where}.{name} has {len(divisors)} divisors for {width // 2} pairs of the {width} rotated '
                        'features: give one a pair.')
    return _unscaled(theta, width) / np.asarray(divisors)
