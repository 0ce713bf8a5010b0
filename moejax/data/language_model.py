"""The pipeline 'language_model': documents as rows of tokens, each with the one that follows it."""
import numpy as np

from moejax.config import ConfigError
from moejax.data.packing import ConcatWindow
from moejax.data.pipeline import PIPELINES
from moejax.data.text_pipeline import Balance, TextPipeline

_NAMES = ('tokens', 'targets', 'target_bytes')


@PIPELINES('language_model')
class LanguageModel(TextPipeline):
  """Batches of tokens, targets, segments, positions, target_bytes <int32>[B,S] and loss_mask <float32>[B,S]; and, where
  the source has them, tasks <int32>[B,S].

  A document `a b c` is the tokens `start a b c` and the targets `a b c end`; documents follow one another and are cut
  into rows of `length`, so that every token of the data is a target exactly once. `target_bytes` is how many bytes of
  text a target stands for (0 for the end), so that the sum of losses over the sum of bytes is bits per byte of text.

  Config:
    length: tokens a row.
    shuffle_batches: training shuffles the rows of so many batches among themselves.
    balance: of what training batches are made in equal parts; see `TextPipeline`.
  """

  def __init__(self, where, source: dict, tokenizer: dict, length: int, batch_size: int, shuffle_batches: int = 16,
               threads: int = 0, readers: int = 1, balance: Balance = 'examples'):
    super().__init__(where, source, tokenizer, batch_size, shuffle_batches, threads, readers, balance)
    if length < 1:
      raise ConfigError(f'{where}.length must be 1 or more, not {length}.')
    self.length = length

  target_segments = 'segments'

  @property
  def lengths(self):
    return {name: self.length for name in (*self._names, 'segments', 'positions')}

  def prepare(self, ids, num_bytes, seed, task=None):
    del seed
    end = [] if self.tokenizer.end is None else [self.tokenizer.end]
    targets = np.append(ids, end).astype(np.int32)
    tokens = np.append([self.tokenizer.start], targets[:-1]).astype(np.int32)[:len(targets)]
    tasks = np.full(len(targets), 0 if task is None else task, np.int32)
    return dict(zip(self._names, (tokens, targets, np.append(num_bytes, [0] * len(end)).astype(np.int32), tasks)))

  def window(self, num_rows):
    return ConcatWindow(num_rows, self.length, self._names)

  @property
  def _names(self):
    return (*_NAMES, 'tasks') if self.source.tasks else _NAMES
