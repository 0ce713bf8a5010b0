"""Pipelines: what a training run sees of its data."""
import abc
import sys
from collections.abc import Iterable, Mapping

import grain
import jax
import numpy as np

from moejax.config import ConfigError, Registry
from moejax.data.source import DataError, Examples, Source, Stream

PIPELINES = Registry('data pipeline')

Batch = dict[str, np.ndarray]
Spec = dict[str, jax.ShapeDtypeStruct]


class Pipeline(abc.ABC):
  """Batches of one data set.

  Attributes:
    where: config path, for errors.
    source: what gives examples.
    batch_size: examples (rows, for text) a batch, over all processes.
    threads: that many threads read and decode ahead; 0 reads when the batch is asked for.
  """

  def __init__(self, where: str, source: Source, batch_size: int, threads: int):
    if batch_size < 1:
      raise ConfigError(f'{where}.batch_size must be 1 or more, not {batch_size}.')
    if threads < 0:
      raise ConfigError(f'{where}.threads must be 0 or more, not {threads}.')
    self.where, self.source, self.batch_size, self.threads = where, source, batch_size, threads
    self._opened = {}

  @property
  def splits(self) -> tuple[str, ...]:
    """The names that `evaluate` knows."""
    return self.source.splits

  def open(self, split: str) -> Examples | Stream:
    """The examples of a split, opened once. Raises DataError where there are none."""
    if split not in self._opened:
      examples = self.source.open(split)
      if not isinstance(examples, Stream) and not len(examples):
        raise DataError(f'{self.source.where}: there are no examples in split {split!r}.')
      self._opened[split] = examples
    return self._opened[split]

  @abc.abstractmethod
  def batch_spec(self, batch_size: int | None = None) -> Spec:
    """Shape and type of every array of a batch over all processes. Opens nothing."""

  @abc.abstractmethod
  def train(self, seed: int, *, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Endless batches of the split `train`; every epoch has another order.

    `get_state()` is a small dict that JSON can hold; after `set_state` the same batches follow. Each process gets
    `batch_size / process_count` rows.

    Raises:
      ConfigError: the batch does not divide over the processes.
      DataError: the data cannot be read.
    """

  @abc.abstractmethod
  def evaluate(self, split: str = 'test', batch_size: int | None = None, *, process_index: int = 0,
               process_count: int = 1) -> Iterable[Batch]:
    """All of a split once, in order, in batches of one shape; the rest of the last one is padding.

    Every process gets as many batches, and the shares of all processes one after the other are the batch of one.
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

  def share(self, batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a batch that are those of a process."""
    if batch_size % process_count:
      raise ConfigError(f'{self.where}.batch_size: {batch_size} rows do not divide over {process_count} processes. '
                        'Use a multiple of that.')
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)

  def read_options(self) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)


def stream_positions(process_index: int, process_count: int) -> grain.MapDataset:
  """Positions of the endless stream that one process reads example by example: together they read each once."""
  return grain.MapDataset.range(process_index, sys.maxsize, process_count)


def require_model_key(model_config: Mapping, key: str, where: str, what: str) -> int:
  """`model_config[key]`. Raises ConfigError where such a model has no such key: it takes other batches."""
  if key not in model_config:
    raise ConfigError(f'{where}: config.data gives {what}, and the model {model_config.get("name")!r} has no '
                      f'{key}: it takes other batches. Choose data and a model that fit.')
  return model_config[key]


def endless(stream: Stream, seed: int, process_index: int, process_count: int) -> grain.IterDataset:
  """A stream over and over, shuffled within windows."""
  part = grain.experimental.RepeatIterDataset(stream.shard(process_index, process_count))
  return grain.experimental.WindowShuffleIterDataset(part, window_size=stream.shuffle_window, seed=seed % 2**32)
