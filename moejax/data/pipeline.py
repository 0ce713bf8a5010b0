"""Pipelines: training and evaluation batches of a data set."""
import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import grain
import jax
import numpy as np

from moejax.config import ConfigError, Registry, config_path
from moejax.data.readers import Readers
from moejax.data.source import DataError, Examples, Source, Stream, place
from moejax.ranges import Count, Divides

PartOfBatch = Annotated[Count, Divides('batch_size')]
Batch = dict[str, np.ndarray]
Spec = dict[str, jax.ShapeDtypeStruct]


class Pipeline(abc.ABC):
  """Batches of one data set.

  Attributes:
    where: config path, for errors.
    source: of the examples.
    batch_size: examples (rows, for text) per batch, over all devices.
    threads: number of threads that read and decode ahead; 0 reads each batch on demand.
    readers: number of independent readers of sequential data (a stream, or documents to pack) in training. Each fills
      an equal share of every batch; changing it changes the batches. A process runs only the readers of its own rows,
      so with fewer readers than processes several processes read the same data.
  """

  def __init__(self, source: Source, batch_size: int, threads: int, readers: int):
    self.source, self.batch_size, self.threads, self.readers = source, batch_size, threads, readers
    self.where = config_path()
    self._opened = {}

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that `evaluate` accepts."""
    return self.source.splits

  def open(self, split: str) -> Any:  # Examples | Stream, depending on the source
    """The examples of a split, opened once. Raises DataError if it is empty."""
    if split not in self._opened:
      examples = self.source.open(split)
      if not isinstance(examples, Stream) and not len(examples):
        raise DataError(f'{self.source.where}: there are no examples in split {split!r}.')
      self._opened[split] = examples
    return self._opened[split]

  def fingerprint(self) -> dict[str, str]:
    """`{part of the training data: its fingerprint}`, to detect a run that resumes with other data."""
    return self.source.fingerprint('train', self.open('train'))

  @abc.abstractmethod
  def batch_spec(self, batch_size: int | None = None) -> Spec:
    """Shape and dtype of every array of a full batch. Opens no file."""

  @abc.abstractmethod
  def train(self, seed: int, rows: np.ndarray | None = None) -> grain.DatasetIterator:
    """Endless batches of the split `train`, reshuffled every epoch.

    `get_state()` is a small dict that JSON can hold; `set_state` resumes with the same batches. At the same batch, the
    states of iterators over different rows agree on common keys, and their union resumes any rows.

    Args:
      seed: of the order.
      rows: <int>[n], increasing: rows of every batch to return; None: all. A row does not depend on the others chosen.

    Raises:
      DataError: the data cannot be read.
    """

  @abc.abstractmethod
  def evaluate(self, split: str = 'test', batch_size: int | None = None,
               rows: np.ndarray | None = None) -> Iterable[Batch]:
    """One pass over a split, in order, in batches of one shape; the last one is padded.

    `rows` is as in `train`; it does not change the number of batches.
    """

  @abc.abstractmethod
  def check(self, model_config: Mapping, where: str = 'config.model') -> None:
    """Raises ConfigError if a model of this config cannot take these batches. Opens no file."""

  @abc.abstractmethod
  def describe(self) -> dict:
    """A summary of the data, by split. Opens the data."""

  def augment(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Augments the batch of one training step; called inside the compiled step.

    On the device this costs next to nothing, and the randomness depends only on the key of the step, so there is no
    state to save. By default, returns the batch unchanged.
    """
    del key
    return batch

  def read_in_parts(self, start: Callable[[int], grain.DatasetIterator], rows: np.ndarray | None) -> Readers:
    """Rows of training batches that are read in shares; `start(reader)` iterates over the share of one reader."""
    return Readers(start, self.readers, self.batch_size, np.arange(self.batch_size) if rows is None else rows)

  def place(self, examples: Examples, index: int) -> str:
    """Where an example comes from, for errors."""
    return f'{self.source.where}: {place(examples, int(index))}'

  def read_options(self) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)


PIPELINES = Registry('data pipeline', Pipeline)


def require_model_key(model_config: Mapping, key: str, where: str, what: str) -> int:
  """`model_config[key]`. Raises ConfigError if the model has no such key, since it then takes other batches."""
  if key not in model_config:
    raise ConfigError(f'{where}: config.data gives {what}, but the model {model_config.get("name")!r} has no '
                      f'{key}: it takes other batches. Choose data and a model that fit.')
  return model_config[key]


def endless(stream: Stream, seed: int, reader: int, readers: int) -> grain.IterDataset:
  """One reader's part of a stream, repeated and shuffled within windows; also seeds later random maps."""
  part = grain.experimental.RepeatIterDataset(stream.shard(reader, readers))
  seed = (seed + reader) % 2**32
  return grain.experimental.WindowShuffleIterDataset(part, window_size=stream.shuffle_window, seed=seed).seed(seed)
