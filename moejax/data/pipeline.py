"""Pipelines: what a training run sees of its data."""
import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import grain
import jax
import numpy as np

from moejax.config import ConfigError, Registry
from moejax.data.readers import Readers
from moejax.data.source import DataError, Examples, Source, Stream, place
from moejax.ranges import Count, Divides

PIPELINES = Registry('data pipeline')

PartOfBatch = Annotated[Count, Divides('batch_size')]
Batch = dict[str, np.ndarray]
Spec = dict[str, jax.ShapeDtypeStruct]


class Pipeline(abc.ABC):
  """Batches of one data set.

  Attributes:
    where: config path, for errors.
    source: what gives examples.
    batch_size: examples (rows, for text) a batch, over all devices.
    threads: that many threads read and decode ahead; 0 reads when the batch is asked for.
    readers: what has to be read in order (a stream; documents, to pack them) is read in so many independent parts in
      training, each of which makes an equal part of every batch. A process reads only those that make rows it feeds,
      so with fewer readers than processes, several read the same. The batches depend on it.
  """

  def __init__(self, where: str, source: Source, batch_size: int, threads: int, readers: int):
    self.where, self.source, self.batch_size, self.threads, self.readers = where, source, batch_size, threads, readers
    self._opened = {}

  @property
  def splits(self) -> tuple[str, ...]:
    """The names that `evaluate` knows."""
    return self.source.splits

  def open(self, split: str) -> Any:  # Examples | Stream, as the source has them
    """The examples of a split, opened once. Raises DataError where there are none."""
    if split not in self._opened:
      examples = self.source.open(split)
      if not isinstance(examples, Stream) and not len(examples):
        raise DataError(f'{self.source.where}: there are no examples in split {split!r}.')
      self._opened[split] = examples
    return self._opened[split]

  def fingerprint(self) -> dict[str, str]:
    """`{part of the training data: what tells it from any other}`, to see whether a run that resumes has the same."""
    return self.source.fingerprint('train', self.open('train'))

  @abc.abstractmethod
  def batch_spec(self, batch_size: int | None = None) -> Spec:
    """Shape and type of every array of a whole batch. Opens nothing."""

  @abc.abstractmethod
  def train(self, seed: int, rows: np.ndarray | None = None) -> grain.DatasetIterator:
    """Endless batches of the split `train`; every epoch has another order.

    `get_state()` is a small dict that JSON can hold; after `set_state` the same batches follow. The states of iterators
    over different rows, at the same batch, agree in what they share, and their union continues any rows.

    Args:
      seed: of the order.
      rows: <int>[n], increasing: which rows of every batch to give; None: all. A row is the same whichever are given.

    Raises:
      DataError: the data cannot be read.
    """

  @abc.abstractmethod
  def evaluate(self, split: str = 'test', batch_size: int | None = None,
               rows: np.ndarray | None = None) -> Iterable[Batch]:
    """All of a split once, in order, in batches of one shape; the rest of the last one is padding.

    `rows` as for `train`; there are as many batches whichever are given.
    """

  @abc.abstractmethod
  def check(self, model_config: Mapping, where: str = 'config.model') -> None:
    """Raises ConfigError where a model of this config cannot take these batches. Opens nothing."""

  @abc.abstractmethod
  def describe(self) -> dict:
    """What there is in the data, by split. Opens it."""

  def augment(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """The batch of one training step with random changes; to be called inside the compiled step.

    On the device, because there it costs next to nothing; and what is drawn depends on the key of the step alone, so
    that no state has to be saved. Here: nothing is changed.
    """
    del key
    return batch

  def read_in_parts(self, start: Callable[[int], grain.DatasetIterator], rows: np.ndarray | None) -> Readers:
    """The rows of training batches, where `start(reader)` gives the part of each that a reader makes."""
    return Readers(start, self.readers, self.batch_size, np.arange(self.batch_size) if rows is None else rows)

  def place(self, examples: Examples, index: int) -> str:
    """Where an example comes from, for errors."""
    return f'{self.source.where}: {place(examples, int(index))}'

  def read_options(self) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)


def require_model_key(model_config: Mapping, key: str, where: str, what: str) -> int:
  """`model_config[key]`. Raises ConfigError where such a model has no such key: it takes other batches."""
  if key not in model_config:
    raise ConfigError(f'{where}: config.data gives {what}, and the model {model_config.get("name")!r} has no '
                      f'{key}: it takes other batches. Choose data and a model that fit.')
  return model_config[key]


def endless(stream: Stream, seed: int, reader: int, readers: int) -> grain.IterDataset:
  """The part of a stream that is one reader's, over and over, shuffled within windows; random maps are seeded too."""
  part = grain.experimental.RepeatIterDataset(stream.shard(reader, readers))
  seed = (seed + reader) % 2**32
  return grain.experimental.WindowShuffleIterDataset(part, window_size=stream.shuffle_window, seed=seed).seed(seed)
