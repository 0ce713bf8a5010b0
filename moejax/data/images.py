"""The pipeline 'images': labelled images of one size."""
import sys

import grain
import jax
import numpy as np

from moejax.config import ConfigError
from moejax.data import augment as augmentations
from moejax.data import crops
from moejax.data.order import Order
from moejax.data.pipeline import PIPELINES, Pipeline, endless, require_model_key
from moejax.data.source import SOURCES, DataError, Stream, columns, transpose


@PIPELINES('images')
class Images(Pipeline):
  """Batches of image <float32>[B,H,W,C], label <int32>[B] (or labels <float32>[B,N]), valid <bool>[B].

  Pixels in [0, 1] become `(pixel - mean) / std`.

  Config:
    crop: how images of other sizes become [image_size, image_size]: 'stretch' the whole, the 'center' square, or as
      Inception is trained: a random part in training, the center in evaluation.
    augment: what the training step does to images, in order; names of `augment.AUGMENTATIONS`.
    multi_label: an image has any number of labels.
    image_size: height and width, in pixels.
    channels: 1 (grey) or 3 (RGB).
    mean: what is taken off, one number or one a channel.
    std: what is divided by, one number or one a channel.
  """

  def __init__(self, where, source: dict, image_size: int, channels: int, batch_size: int,
               crop: crops.Crop = 'stretch', augment: tuple = (), multi_label: bool = False,
               mean: float | tuple = 0.5, std: float | tuple = 0.5, threads: int = 0, readers: int = 1):
    super().__init__(where, SOURCES.build(source, f'{where}.source'), batch_size, threads, readers)
    if self.source.num_classes is None:
      raise ConfigError(f'{where}.source.num_classes is missing: images need labels. '
                        'Set it, or use another pipeline for data without labels.')
    if channels not in (1, 3):
      raise ConfigError(f'{where}.channels must be 1 (grey) or 3 (RGB), not {channels}.')
    if image_size < 1:
      raise ConfigError(f'{where}.image_size must be 1 or more, not {image_size}.')
    for name, value in (('mean', mean), ('std', std)):
      if not isinstance(value, (int, float)) and len(value) != channels:
        raise ConfigError(f'{where}.{name} must be one number or {channels}, one a channel, not {len(value)}.')
    self.image_size, self.channels, self.crop, self.multi_label = image_size, channels, crop, multi_label
    self.mean, self.std = np.float32(mean), np.float32(std)
    self.augmentations = augmentations.build(augment, f'{where}.augment', channels)

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
      return self._batch(columns(examples, order(positions)), [(seed % 2**32, int(p)) for p in positions])

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
      return self._pad(self._batch(columns(examples, indices[indices < len(examples)])), len(rows))

    return grain.MapDataset.range(-(-len(examples) // size)).map(read).to_iter_dataset(self.read_options())

  def check(self, model_config, where='config.model'):
    classes = require_model_key(model_config, 'num_classes', where, 'labelled images')
    if classes < self.source.num_classes or (self.multi_label and classes != self.source.num_classes):
      raise ConfigError(f'{where}.num_classes is {classes}, but {self.source.where} has labels of '
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
    images = augmentations.apply(self.augmentations, batch['image'] * self.std + self.mean, key)
    return {**batch, 'image': (images - self.mean) / self.std}

  def _batch(self, fields, seeds=None):
    """One batch from columns of examples; `seeds` of the random crops, one an image, in training."""
    images = fields.get('image', ())
    count = len(images)
    if isinstance(images, np.ndarray) and images.shape[1:3] == 2 * (self.image_size,) and self.crop != 'inception':
      images = crops.to_unit(images if images.ndim == 4 else images[..., None], self.channels)
    else:
      random = self.crop == 'inception' and seeds is not None
      images = [crops.prepare(image, self.image_size, self.channels, self.crop,
                              np.random.default_rng(seeds[i]) if random else None) for i, image in enumerate(images)]
      images = np.asarray(images, np.float32).reshape(count, self.image_size, self.image_size, self.channels)
    name, labels = self._labels(fields.get('label', ()))
    return {'image': (images - self.mean) / self.std, name: labels, 'valid': np.ones(count, bool)}

  def _labels(self, labels):
    classes = self.source.num_classes
    flat = np.concatenate([np.ravel(label) for label in labels]) if self.multi_label and len(labels) else labels
    flat = np.asarray(flat, np.int32)
    if flat.size and not 0 <= flat.min() <= flat.max() < classes:
      wrong = flat[(flat < 0) | (flat >= classes)][0]
      raise DataError(f'{self.source.where}: an example has the label {wrong}, but there are {classes} classes, '
                      'numbered from 0. Correct num_classes or the data.')
    if not self.multi_label:
      return 'label', flat
    hot = np.zeros((len(labels), classes), np.float32)
    for row, label in zip(hot, labels):
      row[np.asarray(label, int)] = 1
    return 'labels', hot

  def _pad(self, batch, size):
    missing = size - len(batch['valid'])
    if not missing:
      return batch
    return {name: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for name, x in batch.items()}
