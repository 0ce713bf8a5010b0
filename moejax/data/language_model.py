"""The pipeline 'language_model': documents as rows of tokens, each with its next token as the target."""
import numpy as np

from moejax.data.packing import ConcatWindow
from moejax.data.pipeline import PIPELINES, PartOfBatch
from moejax.data.text_pipeline import Balance, TextPipeline, joined, with_last
from moejax.ranges import Count, Natural

_NAMES = ('tokens', 'targets', 'target_bytes')


@PIPELINES('language_model')
class LanguageModelPipeline(TextPipeline):
  """Batches of tokens, targets, segments, positions, target_bytes <int32>[B,S] and loss_mask <float32>[B,S]; and, where
  the source has tasks, tasks <int32>[B,S].

  A document `a b c` is the tokens `start a b c` and the targets `a b c end`; documents are concatenated and cut into
  rows of `length`, so that every token of the data is a target exactly once. `target_bytes` is the number of bytes of
  text that a target stands for (0 for the end), so that total loss over total bytes is bits per byte of text.

  Config keys:
    length: tokens per row.
  """

  def __init__(self, source: dict, tokenizer: dict, length: Count, batch_size: Count,
               shuffle_batches: Count = 16, threads: Natural = 0, readers: PartOfBatch = 1,
               balance: Balance = 'examples'):
    super().__init__(source, tokenizer, batch_size, shuffle_batches, threads, readers, balance)
    self.length = length

  @property
  def target_segments(self):
    return 'segments'

  @property
  def lengths(self):
    return dict.fromkeys((*self._names, 'segments', 'positions'), self.length)

  def prepare(self, pieces, seed, task=None):
    del seed
    before = [self.tokenizer.start]
    for (ids, num_bytes), last in with_last(pieces):
      end = [self.tokenizer.end] if last and self.tokenizer.end is not None else []
      targets = joined(ids, end)
      tokens = joined(before, targets[:-1])[:len(targets)]
      tasks = np.full(len(targets), 0 if task is None else task, np.int32)
      yield len(targets), dict(zip(self._names, (tokens, targets, joined(num_bytes, [0] * len(end)), tasks)))
      before = targets[-1:] if len(targets) else before

  def window(self, num_rows):
    return ConcatWindow(num_rows, self.length, self._names)

  @property
  def _names(self):
    return (*_NAMES, 'tasks') if self.source.tasks else _NAMES
