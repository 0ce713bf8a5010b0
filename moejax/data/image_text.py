"""The pipeline 'image_text': images of one size, each with its caption."""
from typing import Any

import jax
import numpy as np

from moejax.config import ConfigError
from moejax.data import crops
from moejax.data.images import Channels, Images
from moejax.data.pipeline import PIPELINES, PartOfBatch
from moejax.data.source import DataError
from moejax.data.tokenizers import TOKENIZERS
from moejax.ranges import Count, Natural, Positive


@PIPELINES('image_text')
class ImageText(Images):
  """Batches of 'images' plus tokens and segments <int32>[B,length] of the captions; segments are 1, and 0 for padding.

  Config keys:
    tokenizer: tokenizer of the captions.
    length: tokens per caption; longer captions are cut.
  """

  def __init__(self, source: dict, image_size: Count, channels: Channels, tokenizer: dict, length: Count,
               batch_size: Count, crop: crops.Crop = 'stretch', augment: tuple = (),
               mean: float | tuple[float, ...] = 0.5, std: Positive | tuple[Positive, ...] = 0.5, threads: Natural = 0,
               readers: PartOfBatch = 1):
    super().__init__(source, image_size, channels, batch_size, crop, augment, False, mean, std, threads, readers)
    if not hasattr(self.source, 'class_captions'):
      raise ConfigError(f'.source {source["name"]!r} has no captions. Choose digits_with_captions or emoji, or '
                        "the pipeline 'images'.")
    self.tokenizer = TOKENIZERS.build(tokenizer, '.tokenizer')
    self.length = length

  def fingerprint(self):
    return super().fingerprint() | self.tokenizer.fingerprint()

  def batch_spec(self, batch_size=None):
    spec = super().batch_spec(batch_size)
    text = jax.ShapeDtypeStruct((batch_size or self.batch_size, self.length), np.int32)
    return {**spec, 'tokens': text, 'segments': text}

  def check(self, model_config, where='config.model'):
    for name, here in (('image_size', self.image_size), ('channels', self.channels), ('text_length', self.length)):
      if model_config.get(name, here) != here:
        raise ConfigError(f'{where}.{name} is {model_config[name]}, but {self.where} gives {here}. They must be equal.')
    if 'text_length' not in model_config:
      raise ConfigError(f'{where}: config.data gives images with captions, which the model '
                        f'{model_config.get("name")!r} does not take. Choose data and a model that fit.')
    if model_config.get('vocab_size', 0) < self.tokenizer.vocab_size:
      raise ConfigError(f'{where}.vocab_size must be at least {self.tokenizer.vocab_size}, the vocabulary size of '
                        f'{self.where}.tokenizer.')

  def describe(self):
    return {**super().describe(), 'vocab_size': self.tokenizer.vocab_size, 'length': self.length}

  def class_captions(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Captions of all classes, as tokens and segments <int32>[M,length], and the class of each, <int32>[M]."""
    source: Any = self.source  # has captions, as checked in __init__
    captions = source.class_captions
    classes = np.repeat(np.arange(len(captions), dtype=np.int32), [len(of_one) for of_one in captions])
    return self.encode([caption for of_one in captions for caption in of_one]), classes

  def encode(self, captions) -> dict[str, np.ndarray]:
    """`{'tokens', 'segments'}`, <int32>[n,length], of n texts. Raises DataError for a text without tokens."""
    tokens, segments = np.zeros((2, len(captions), self.length), np.int32)
    for row, caption in enumerate(captions):
      ids = self.tokenizer.encode({'text': str(caption)})[0][:self.length]
      if not len(ids):
        raise DataError(f'{self.source.where}: the caption {str(caption)!r} of an image has no tokens.')
      tokens[row, :len(ids)], segments[row, :len(ids)] = ids, 1
    return {'tokens': tokens, 'segments': segments}

  def _batch(self, fields, seeds=None, place=None):
    return {**super()._batch(fields, seeds, place), **self.encode(fields.get('text', ()))}
