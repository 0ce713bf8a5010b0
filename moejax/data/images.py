"""The pipeline 'images': labelled images of one size."""
import functools
import sys
from typing import Any, Literal

import grain
import jax
import numpy as np

from moejax.config import ConfigError
from moejax.data import augment as augment_lib
from moejax.data import crops
from moejax.data.order import Order
from moejax.data.pipeline import PIPELINES, PartOfBatch, Pipeline, endless, require_model_key
from moejax.data.source import SOURCES, DataError, Stream, columns, decoding, transpose, whole_numbers
from moejax.ranges import Count, Natural, Positive


Channels = Literal[1, 3]


@PIPELINES('images')
class Images(Pipeline):
  """Batches of image <float32>[B,H,W,C], label <int32>[B] (or labels <float32>[B,N]), valid <bool>[B].

  Pixels in [0, 1] become `(pixel - mean) / std`.

  Config keys:
    image_size: H and W.
    channels: C: 1 for grey, 3 for RGB.
    crop: how images of other sizes become [image_size, image_size]: 'stretch' the whole image, crop the 'center'
      square, or 'inception': a random crop in training, the central one in evaluation.
    augment: augmentations that the training step applies in order; names of `augment.AUGMENTATIONS`.
    multi_label: an image may have any number of labels.
    mean, std: of pixels; a float, or one per channel.
  """

  def __init__(self, source: dict, image_size: Count, channels: Channels, batch_size: Count,
               crop: crops.Crop = 'stretch', augment: tuple = (), multi_label: bool = False,
               mean: float | tuple[float, ...] = 0.5, std: Positive | tuple[Positive, ...] = 0.5, threads: Natural = 0,
               readers: PartOfBatch = 1):
    super().__init__(SOURCES.build(source, '.source'), batch_size, threads, readers)
    if self.source.num_classes is None:
      raise ConfigError('.source.num_classes is missing: this pipeline requires labels. '
                        'Set it, or use another pipeline for data without labels.')
    for name, value in (('mean', mean), ('std', std)):
      if not isinstance(value, (int, float)) and len(value) != channels:
        raise ConfigError(f'.{name} must be a float or {channels} of them, one per channel, not {len(value)}.')
    self.image_size, self.channels, self.multi_label = image_size, channels, multi_label
    self.crop: crops.Crop = crop
    number: Any = np.float32  # of a float or an array
    self.mean, self.std = number(mean), number(std)
    self.augmentations = augment_lib.build(augment, '.augment', channels)

  def batch_spec(self, batch_size=None):
    size = batch_size or self.batch_size
    classes = self.source.num_classes
    label = (('labels', jax.ShapeDtypeStruct((size, classes), np.float32)) if self.multi_label else
             ('label', jax.ShapeDtypeStruct((size,), np.int32)))
    image = jax.ShapeDtypeStruct((size, self.image_size, self.image_size, self.channels), np.float32)
    return dict([('image', image), label, ('valid', jax.ShapeDtypeStruct((size,), np.bool_))])

  def train(self, seed, rows=None):
    examples = self.open('train')
    if isinstance(examples, Stream):
      return self.read_in_parts(lambda reader: self._read(examples, seed, reader), rows)
    order = Order(len(examples), seed)
    rows = np.arange(self.batch_size) if rows is None else rows

    def read(step):
      positions = step * self.batch_size + rows
      return self._rows(examples, order(positions), [(seed % 2**32, int(p)) for p in positions])

    steps = grain.MapDataset.range(sys.maxsize // self.batch_size)
    return iter(steps.map(read).to_iter_dataset(self.read_options()))

  def _read(self, stream, seed, reader):
    rows = self.batch_size // self.readers
    batches = endless(stream, seed, reader, self.readers).batch(rows, drop_remainder=True, batch_fn=transpose)
    return iter(batches.random_map(lambda batch, rng: self._batch(batch, rng.integers(2**32, size=rows))))

  def evaluate(self, split='test', batch_size=None, rows=None):
    size = batch_size or self.batch_size
    rows = np.arange(size) if rows is None else rows
    self.source.check_split(split)
    examples = self.open(split)
    if isinstance(examples, Stream):
      batches = examples.batch(size, drop_remainder=False, batch_fn=transpose)
      return batches.map(lambda batch: {name: x[rows] for name, x in self._pad(self._batch(batch), size).items()})

    def read(step):
      indices = step * size + rows
      return self._pad(self._rows(examples, indices[indices < len(examples)]), len(rows))

    return grain.MapDataset.range(-(-len(examples) // size)).map(read).to_iter_dataset(self.read_options())

  @property
  def num_classes(self) -> int:
    """Labels are below it; sources without labels are refused."""
    return self.source.num_classes or 0

  def check(self, model_config, where='config.model'):
    classes = require_model_key(model_config, 'num_classes', where, 'labelled images')
    if classes < self.num_classes or (self.multi_label and classes != self.num_classes):
      raise ConfigError(f'{where}.num_classes is {classes}, but {self.source.where} has '
                        f'{self.source.num_classes} classes. Set it to that.')
    for name, here in (('image_size', self.image_size), ('channels', self.channels)):
      if model_config.get(name, here) != here:
        raise ConfigError(f'{where}.{name} is {model_config[name]}, but {self.where}.{name} is {here}. '
                          'They must be equal.')

  def describe(self):
    return {'classes': self.source.num_classes, 'image': [self.image_size, self.image_size, self.channels],
            'examples': {split: None if isinstance(self.open(split), Stream) else len(self.open(split))
                         for split in self.splits}}

  def augment(self, batch, key):
    if not self.augmentations:
      return batch
    images = augment_lib.apply(self.augmentations, batch['image'] * self.std + self.mean, key)
    return {**batch, 'image': (images - self.mean) / self.std}

  def _rows(self, examples, indices, seeds=None):
    return self._batch(columns(examples, indices), seeds, lambda row: self.place(examples, indices[row]))

  def _batch(self, fields, seeds=None, place=None):
    """One batch from columns of examples.

    `seeds`: of the random crops in training, one per image; `place(row)`: an example's origin, for errors.
    """
    place = place or (lambda row: f'{self.source.where}: an example')
    if fields and not {'image', 'label'} <= set(fields):
      raise DataError(f'{self.source.where}: the source gives {", ".join(fields)}, but this pipeline requires images '
                      'with labels.')
    images = fields.get('image', ())
    count = len(images)
    if isinstance(images, np.ndarray) and images.shape[1:3] == 2 * (self.image_size,) and self.crop != 'inception':
      with decoding(self.source.where, 'does not give images'):
        images = crops.to_unit(images if images.ndim == 4 else images[..., None], self.channels)
    else:
      images = [self._crop(image, None if seeds is None else seeds[row], functools.partial(place, row))
                for row, image in enumerate(images)]
      images = np.asarray(images, np.float32).reshape(count, self.image_size, self.image_size, self.channels)
    name, labels = self._labels(fields.get('label', ()), place)
    return {'image': (images - self.mean) / self.std, name: labels, 'valid': np.ones(count, bool)}

  def _crop(self, image, seed, place):
    with decoding(place, 'the image cannot be decoded'):
      rng = np.random.default_rng(seed) if self.crop == 'inception' and seed is not None else None
      return crops.prepare(image, self.image_size, self.channels, self.crop, rng)

  def _labels(self, labels, place):
    classes = self.num_classes
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in 'iu':
      rows, flat = np.arange(len(labels)), labels
    else:
      labels = [self._label(label, functools.partial(place, row)) for row, label in enumerate(labels)]
      rows = np.repeat(np.arange(len(labels)), [label.size for label in labels])
      flat = np.concatenate([np.zeros(0, np.int64), *map(np.ravel, labels)])
    wrong = np.flatnonzero((flat < 0) | (flat >= classes))
    if wrong.size:
      raise DataError(f'{place(rows[wrong[0]])} has the label {flat[wrong[0]]}, but there are {classes} classes, '
                      'numbered from 0. Correct num_classes or the data.')
    if not self.multi_label:
      return 'label', flat.astype(np.int32)
    hot = np.zeros((len(labels), classes), np.float32)
    hot[rows, flat] = 1
    return 'labels', hot

  def _label(self, label, place):
    with decoding(place, 'its labels are not ints', 'Correct the data.'):
      label = whole_numbers(label)
    if label.ndim and not self.multi_label:
      raise DataError(f'{place()} has a list of {label.size} labels. Set {self.where}.multi_label, or correct the '
                      'data.')
    return label

  def _pad(self, batch, size):
    missing = size - len(batch['valid'])
    if not missing:
      return batch
    return {name: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for name, x in batch.items()}
