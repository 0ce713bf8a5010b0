"""Labelled images: scikit-learn's digits, and IDX files (MNIST and data sets in its format)."""
import dataclasses
import functools
import math
import os

import numpy as np

from moejax.config import config_path
from moejax.data.files import Path, local_path, read_file
from moejax.data.source import SOURCES, Arrays, DataError, Source, holdout, require
from moejax.ranges import Count, Natural

_MOST_DIMENSIONS = 64  # of a numpy array


@SOURCES('digits')
@dataclasses.dataclass(frozen=True)
class Digits(Source):
  """The 1,797 handwritten digits of scikit-learn, 8x8 grey pixels: 1,437 to train on and 360 to test."""
  where: str = dataclasses.field(init=False, default_factory=config_path)
  test_examples: Count = 360
  split_seed: Natural = 0
  num_classes = 10

  def open(self, split):
    self.check_split(split)
    images, labels = self._everything
    chosen = holdout(len(labels), self.test_examples, self.split_seed, f'{self.where}.test_examples')[split]
    return Arrays(image=images[chosen], label=labels[chosen])

  @functools.cached_property
  def _everything(self):
    digits = require('sklearn.datasets', 'scikit-learn', 'The source digits').load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)


@SOURCES('idx')
@dataclasses.dataclass(frozen=True)
class Idx(Source):
  """A folder with the four files of MNIST (`train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, ...), `.gz` or not.

  Config keys:
    path: the folder.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  path: Path
  num_classes: Count

  def open(self, split):
    self.check_split(split)
    prefix = {'train': 'train', 'test': 't10k'}[split]
    images, labels = self._read(f'{prefix}-images', 3), self._read(f'{prefix}-labels', 1)
    if len(images) != len(labels):
      raise DataError(f'{self.path}: {len(images)} images but {len(labels)} labels in split {split!r}. '
                      'Download the files again.')
    return Arrays(image=images, label=labels.astype(np.int32))

  def _read(self, name, dimensions):
    path = os.path.join(local_path(self.path, f'{self.where}.path'), f'{name}-idx{dimensions}-ubyte')
    found = next((candidate for candidate in (path, path + '.gz') if os.path.isfile(candidate)), None)
    if found is None:
      raise DataError(f'{self.where}.path: there is no file {path} or {path}.gz. {self._advice()}')
    array = read_idx(found)
    if array.ndim != dimensions:
      raise DataError(f'{found}: its header declares {array.ndim} dimensions, but {name} have {dimensions}. '
                      'Download it again.')
    return array

  def _advice(self):
    return 'Put the four IDX files there.'


@SOURCES('fashion_mnist')
@dataclasses.dataclass(frozen=True)
class FashionMnist(Idx):
  """70,000 pictures of clothes, 28x28 grey, 10 classes (Xiao et al. 2017, arXiv:1708.07747)."""
  path: Path = '/usr/share/datasets/fashion-mnist'
  num_classes: Count = 10

  def _advice(self):
    return 'Debian and Ubuntu install them with: apt-get install dataset-fashion-mnist.'


def read_idx(path: str) -> np.ndarray:
  """The uint8 array in an IDX file: two zero bytes, the type 8, the number of dimensions, big-endian sizes, the bytes.

  Raises:
    DataError: the file is not an IDX file of bytes, or its length does not match its header.
  """
  raw = read_file(path)
  if len(raw) < 4 or raw[:3] != b'\0\0\x08' or len(raw) < 4 + 4 * raw[3]:
    raise DataError(f'{path}: not an IDX file of bytes; it begins with {raw[:4]!r}.')
  if not 0 < raw[3] <= _MOST_DIMENSIONS:
    raise DataError(f'{path}: its header declares {raw[3]} dimensions; 1 to {_MOST_DIMENSIONS} are allowed. '
                    'Download it again.')
  start = 4 + 4 * raw[3]
  shape = tuple(int(size) for size in np.frombuffer(raw, '>u4', raw[3], offset=4))
  if len(raw) - start != math.prod(shape):
    raise DataError(f'{path}: its header declares {shape}, {math.prod(shape)} bytes, but {len(raw) - start} follow. '
                    'Download it again.')
  return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
