"""The pipeline 'speech': recordings as frames of features, with the characters of their transcripts."""
import functools
import sys
from typing import Annotated, Any, Literal

import grain
import jax
import numpy as np

from moejax.config import ConfigError
from moejax.data.order import Order
from moejax.data.pipeline import PIPELINES, Pipeline, require_model_key
from moejax.data.source import SOURCES, DataError
from moejax.ranges import Count, Natural, NotEmpty

LETTERS = "abcdefghijklmnopqrstuvwxyz '"


@PIPELINES('speech')
class SpeechPipeline(Pipeline):
  """Batches of frames <float32>[B,length,C], segments <int32>[B,length] (1; 0 for padding), targets <int32>[B,labels]
  and loss_mask <float32>[B,labels] (1; 0 for padding). Target 1 + i is character i of the alphabet; 0 is CTC's blank.

  Config keys:
    length: frames per recording; longer recordings are cut.
    labels: maximum number of characters in a transcript.
    alphabet: the characters of transcripts.
    normalize: scale features to mean 0 and standard deviation 1 over all frames of the training 'corpus', or of each
      'utterance' (which also removes the constant part of a voice); 'none' leaves them unchanged.
  """

  def __init__(self, source: dict, batch_size: Count, length: Count, labels: Count,
               alphabet: Annotated[str, NotEmpty()] = LETTERS,
               normalize: Literal['corpus', 'utterance', 'none'] = 'corpus', threads: Natural = 0):
    super().__init__(SOURCES.build(source, '.source'), batch_size, threads, readers=1)
    if not hasattr(self.source, 'num_features'):
      raise ConfigError(f'.source {source["name"]!r} does not give speech. Choose spoken_digits or speakers.')
    if len(set(alphabet)) != len(alphabet):
      raise ConfigError(f'.alphabet must be distinct characters, not {alphabet!r}.')
    self.length, self.labels, self.alphabet, self.normalize = length, labels, alphabet, normalize

  @property
  def num_features(self) -> int:
    """Of a frame."""
    source: Any = self.source  # one of speech, as __init__ has seen
    return source.num_features

  @property
  def vocab_size(self) -> int:
    """The number of target ids, with the blank."""
    return len(self.alphabet) + 1

  def batch_spec(self, batch_size=None):
    size = batch_size or self.batch_size
    spec = lambda *shape, dtype: jax.ShapeDtypeStruct((size, *shape), dtype)
    return dict(frames=spec(self.length, self.num_features, dtype=np.float32),
                segments=spec(self.length, dtype=np.int32), targets=spec(self.labels, dtype=np.int32),
                loss_mask=spec(self.labels, dtype=np.float32))

  def train(self, seed, rows=None):
    examples = self.open('train')
    order, rows = Order(len(examples), seed), np.arange(self.batch_size) if rows is None else rows

    def read(step):
      return self._batch([examples[int(index)] for index in order(step * self.batch_size + rows)], len(rows))

    steps = grain.MapDataset.range(sys.maxsize // self.batch_size)
    return iter(steps.map(read).to_iter_dataset(self.read_options()))

  def evaluate(self, split='test', batch_size=None, rows=None):
    size = batch_size or self.batch_size
    rows = np.arange(size) if rows is None else rows
    self.source.check_split(split)
    examples = self.open(split)

    def read(step):
      indices = step * size + rows
      return self._batch([examples[int(index)] for index in indices[indices < len(examples)]], len(rows))

    return grain.MapDataset.range(-(-len(examples) // size)).map(read).to_iter_dataset(self.read_options())

  def check(self, model_config, where='config.model'):
    features = require_model_key(model_config, 'num_features', where, 'speech')
    if features != self.num_features:
      raise ConfigError(f'{where}.num_features is {features}, but {self.source.where} gives '
                        f'{self.num_features}. They must be equal.')
    if model_config.get('vocab_size', 0) < self.vocab_size:
      raise ConfigError(f'{where}.vocab_size must be at least {self.vocab_size}: the characters of '
                        f'{self.where}.alphabet, and the blank.')

  def describe(self):
    cut = {split: sum(len(self.open(split)[i]['frames']) > self.length for i in range(len(self.open(split))))
           for split in self.splits}
    return {'vocab_size': self.vocab_size, 'num_features': self.num_features, 'recordings_cut': cut,
            'examples': {split: len(self.open(split)) for split in self.splits}}

  def ids(self, text: str) -> list[int]:
    """The targets of a transcript. Raises DataError if it is too long or has unknown characters."""
    unknown = sorted(set(text) - set(self.alphabet))
    if unknown:
      raise DataError(f'{self.source.where}: the transcript {text!r} has {unknown[0]!r}, which is not in '
                      f'{self.where}.alphabet.')
    if len(text) > self.labels:
      raise DataError(f'{self.source.where}: the transcript {text!r} has {len(text)} characters; raise '
                      f'{self.where}.labels to that.')
    return [1 + self.alphabet.index(character) for character in text]

  @functools.cached_property
  def _scale(self):
    """(mean, standard deviation), [C] each, of the training frames."""
    examples = self.open('train')
    return _moments(np.concatenate([examples[index]['frames'] for index in range(len(examples))]))

  def _batch(self, examples, size):
    batch = {name: np.zeros((size, *spec.shape[1:]), spec.dtype) for name, spec in self.batch_spec().items()}
    for row, example in enumerate(examples):
      frames, targets = example['frames'], self.ids(example['text'])
      if self.normalize != 'none':
        mean, deviation = self._scale if self.normalize == 'corpus' else _moments(frames)
        frames = (frames - mean) / deviation
      count = min(len(frames), self.length)
      batch['frames'][row, :count], batch['segments'][row, :count] = frames[:count], 1
      batch['targets'][row, :len(targets)], batch['loss_mask'][row, :len(targets)] = targets, 1
    return batch


def _moments(frames):
  # A constant feature becomes 0.
  return frames.mean(0, dtype=np.float64), np.maximum(frames.std(0, dtype=np.float64), 1e-6)
