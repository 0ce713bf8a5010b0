"""Augmentations of one image, as pure functions of (image, key), from DeepMind's PIX.

Images are <float>[H,W,C] in [0, 1]. The pipeline maps them over the batch inside the training step.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import dm_pix as pix
import jax
import jax.numpy as jnp

from moejax.config import ConfigError, Registry
from moejax.random import derive
from moejax.ranges import Natural, NonNegative, NotBelow


class Augmentation:
  """Base class of augmentations."""

  def __call__(self, image: jax.Array, key: jax.Array) -> jax.Array:
    """image: <float>[H,W,C] in [0, 1]."""
    raise NotImplementedError


AUGMENTATIONS = Registry('augmentation', Augmentation)


@AUGMENTATIONS('flip')
@dataclasses.dataclass(frozen=True)
class Flip(Augmentation):
  """Horizontal flip with probability 1/2."""

  def __call__(self, image, key):
    return pix.random_flip_left_right(key, image)


@AUGMENTATIONS('pad_crop')
@dataclasses.dataclass(frozen=True)
class PadCrop(Augmentation):
  """Zero padding, then a random crop of the original size.

  Config keys:
    padding: pixels added on each side.
  """
  padding: Natural

  def __call__(self, image, key):
    around = (self.padding, self.padding)
    return pix.random_crop(key, jnp.pad(image, (around, around, (0, 0))), image.shape)


@AUGMENTATIONS('brightness')
@dataclasses.dataclass(frozen=True)
class Brightness(Augmentation):
  """Adds one random offset to all pixels.

  Config keys:
    max_delta: largest absolute offset.
  """
  max_delta: NonNegative

  def __call__(self, image, key):
    return pix.random_brightness(key, image, self.max_delta)


@AUGMENTATIONS('contrast')
@dataclasses.dataclass(frozen=True)
class Contrast(Augmentation):
  """Scales the deviation from the channel mean by a factor in [lower, upper].

  Config keys:
    lower, upper: bounds of the factor.
  """
  lower: NonNegative
  upper: Annotated[NonNegative, NotBelow('lower')]

  def __call__(self, image, key):
    return pix.random_contrast(key, image, self.lower, self.upper)


@AUGMENTATIONS('saturation')
@dataclasses.dataclass(frozen=True)
class Saturation(Augmentation):
  """Multiplies the saturation of a colour image by a factor in [lower, upper].

  Config keys:
    lower, upper: bounds of the factor.
  """
  lower: NonNegative
  upper: Annotated[NonNegative, NotBelow('lower')]

  def __call__(self, image, key):
    return pix.random_saturation(key, image, self.lower, self.upper)


@AUGMENTATIONS('rotate')
@dataclasses.dataclass(frozen=True)
class Rotate(Augmentation):
  """Rotates the image; pixels from outside it are 0.

  Config keys:
    max_degrees: largest absolute angle.
  """
  max_degrees: NonNegative

  def __call__(self, image, key):
    limit = jnp.deg2rad(self.max_degrees)
    angle: Any = jax.random.uniform(key, minval=-limit, maxval=limit)
    return pix.rotate(image, angle, mode='constant')


def build(configs: Sequence, where: str, channels: int) -> list:
  """The augmentations named in `configs`, in order."""
  for index, config in enumerate(configs):
    if isinstance(config, Mapping) and config.get('name') == 'saturation' and channels != 3:
      raise ConfigError(f'{where}[{index}]: saturation requires images of 3 channels, not {channels}.')
  return [AUGMENTATIONS.build(config, f'{where}[{index}]') for index, config in enumerate(configs)]


def apply(augmentations: Sequence, images: jax.Array, key: jax.Array) -> jax.Array:
  """Augments `images: <float>[B,H,W,C]` in [0, 1], each with its own random key, and clips to [0, 1]."""
  for index, augmentation in enumerate(augmentations):
    keys = jax.random.split(derive(key, index), images.shape[0])
    images = jnp.clip(jax.vmap(augmentation)(images, keys), 0, 1)
  return images
