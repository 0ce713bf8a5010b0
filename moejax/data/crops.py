"""Crops and resizes images to the size of the model."""
import io
import math
from typing import Literal

import numpy as np
from PIL import Image

Crop = Literal['stretch', 'center', 'inception']

# The usual evaluation crop: 224 of 256 pixels.
_CENTER_SHARE = 224 / 256


def prepare(image, size: int, channels: int, crop: Crop, rng: np.random.Generator | None) -> np.ndarray:
  """<float32>[size,size,channels] in [0, 1] of an encoded image, or an array [H,W] or [H,W,C].

  With `rng` (training) 'inception' takes a random crop; without, and with 'center', the central one. Raises the
  exceptions of Pillow if the bytes are not an image.
  """
  if isinstance(image, bytes):
    image = Image.open(io.BytesIO(image))
  else:
    image = np.asarray(image)
    if image.shape[:2] == (size, size) and crop != 'inception':
      return to_unit(image if image.ndim == 3 else image[..., None], channels)
    image = _from_array(image)
  if 0 in image.size:
    raise ValueError('it has no pixels')
  image = image.convert('L' if channels == 1 else 'RGB')
  if crop == 'inception' and rng is not None:
    box = inception_box(*image.size, rng)
  else:
    box = (0, 0, *image.size) if crop == 'stretch' else center_box(*image.size, crop)
  resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
  return to_unit(np.asarray(resized).reshape(size, size, channels), channels)


def to_unit(images: np.ndarray, channels: int) -> np.ndarray:
  """Images [...,H,W,C], uint8 or float in [0, 1], as float32 with `channels` channels.

  Raises:
    ValueError: the image has neither `channels` channels nor 1 (which is repeated).
  """
  images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
  if images.shape[-1] == channels:
    return images
  if images.shape[-1] == 1:
    return np.repeat(images, channels, -1)
  raise ValueError(f'an image has {images.shape[-1]} channels, and config.data.channels is {channels}')


def center_box(width: int, height: int, crop: Crop) -> tuple[float, float, float, float]:
  """The largest central square; for 'inception', 7/8 of it, its evaluation crop."""
  side = min(width, height) * (_CENTER_SHARE if crop == 'inception' else 1)
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def inception_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
  """A box of 8% to 100% of the area, aspect ratio 3:4 to 4:3 (Szegedy et al. 2015, arXiv:1409.4842, section 6).

  Falls back to the central square after ten draws that do not fit the image.
  """
  for _ in range(10):
    area = width * height * rng.uniform(.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if wide <= width and high <= height:
      left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
      return left, top, left + wide, top + high
  return center_box(width, height, 'center')


def _from_array(image):
  if image.dtype != np.uint8:
    image = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
  return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
