"""The base class of text pipelines: tokenizes, prepares, packs and batches documents."""
import abc
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import grain
import jax
import numpy as np

from moejax.config import ConfigError, config_path
from moejax.data.order import Order
from moejax.data.packing import Document, Packing, Window
from moejax.data.pipeline import Pipeline, endless, require_model_key
from moejax.data.source import SOURCES, Example, Stream, decoding
from moejax.data.tokenizers import TOKENIZERS, Piece


Balance = Literal['examples', 'tasks']


class TextPipeline(Pipeline):
  """Attributes:
    tokenizer: text -> ids.
    vocab_size: all ids of batches are below it.
    shuffle_batches: number of batches whose rows training shuffles among themselves.
    balance: 'examples': training sees every document equally often; 'tasks': each of the source's tasks fills an equal
      share of every training batch, in its own rows (DEMix, section 3).
  """

  def __init__(self, source: dict, tokenizer: dict, batch_size: int, shuffle_batches: int, threads: int,
               readers: int, balance: Balance):
    built = SOURCES.build(source, '.source')
    if balance == 'tasks' and not built.tasks:
      raise ConfigError(f".balance is 'tasks', but the source {source['name']!r} has no tasks. Use the source "
                        "'mixture'.")
    self.balance, self._shares = balance, len(built.tasks) if balance == 'tasks' else 1
    if batch_size % (readers * self._shares):
      raise ConfigError(f'.batch_size must be a multiple of {readers * self._shares}, the number of tasks that '
                        f'share it times {config_path()}.readers, not {batch_size}.')
    # Each task has its own readers, so its position is saved like any other reader's.
    super().__init__(built, batch_size, threads, readers * self._shares)
    self.tokenizer = TOKENIZERS.build(tokenizer, '.tokenizer')
    self.vocab_size = self.tokenizer.vocab_size
    self.shuffle_batches = shuffle_batches

  @abc.abstractmethod
  def prepare(self, pieces: Iterable[Piece], seed: tuple[int, ...], task: int | None = None
              ) -> Iterator[tuple[int, Any]]:
    """Turns the pieces of a document, and its task if known, into the parts of a `Document` that `window` takes.

    The result does not depend on how the document is cut into pieces.
    """

  @abc.abstractmethod
  def window(self, num_rows: int) -> Window:
    """A window of `num_rows` empty rows."""

  @property
  @abc.abstractmethod
  def lengths(self) -> dict[str, int]:
    """The int arrays of a batch and their lengths; `loss_mask` is added later."""

  @property
  @abc.abstractmethod
  def target_segments(self) -> str:
    """The name of the array that is 0 where a target is padding."""

  def fingerprint(self):
    return super().fingerprint() | self.tokenizer.fingerprint()

  def batch_spec(self, batch_size=None):
    size = batch_size or self.batch_size
    spec = {name: jax.ShapeDtypeStruct((size, length), np.int32) for name, length in self.lengths.items()}
    return {**spec, 'loss_mask': jax.ShapeDtypeStruct((size, self.lengths[self.target_segments]), np.float32)}

  def train(self, seed, rows=None):
    examples, seed = self.open('train'), seed % 2**32

    def start(reader):
      if isinstance(examples, Stream):
        documents = endless(examples, seed, reader, self.readers).random_map(
            lambda example, rng: self._document(self.source.where, example, (int(rng.integers(2**32)),)))
      else:
        share, part = reader % self._shares, reader // self._shares
        shared = examples.parts[share] if self.balance == 'tasks' else examples
        order, own = Order(len(shared), seed), (seed,) if self.balance == 'examples' else (seed, share)
        documents = grain.MapDataset.range(part, sys.maxsize, self.readers // self._shares).map(
            lambda position: self._by_index(self._document, shared, order.at(position), (*own, position)))
        documents = documents.to_iter_dataset(self.read_options())
      part = self.batch_size // self.readers
      batches = Packing(documents, self.window, part, self.shuffle_batches, (seed, reader))
      return iter(batches.map(self._with_loss_mask))
    return self.read_in_parts(start, rows)

  def evaluate(self, split='test', batch_size=None, rows=None):
    self.source.check_split(split)
    # Everything is packed, whichever rows are requested: the place of a document depends on all before it.
    documents = self._ordered(split, self._document)
    batches = Packing(documents, self.window, batch_size or self.batch_size, 1, None).map(self._with_loss_mask)
    return batches if rows is None else batches.map(lambda batch: {name: x[rows] for name, x in batch.items()})

  def documents(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and bytes of every document of a split, in order, without start and end."""
    self.source.check_split(split)
    def encode(place, example, seed):
      with decoding(place, 'cannot be tokenized'):
        return self.tokenizer.encode(example)
    return iter(self._ordered(split, encode))

  def check(self, model_config, where='config.model'):
    size = require_model_key(model_config, 'vocab_size', where, 'tokens')
    if size < self.vocab_size:
      raise ConfigError(f'{where}.vocab_size is {size}, but {self.where} gives ids below {self.vocab_size}. '
                        f'Set it to {self.vocab_size} or more.')
    for path, count in _entries(model_config, where, 'num_tasks'):
      if count < len(self.source.tasks) or not self.source.tasks:
        raise ConfigError(f'{path} is {count}, but {self.source.where} has {len(self.source.tasks)} tasks. Make them '
                          "agree; the source 'mixture' makes each of its sources a task.")

  def describe(self):
    return {'vocab_size': self.vocab_size, 'lengths': self.lengths, 'tasks': self.source.tasks,
            'documents': {split: None if isinstance(self.open(split), Stream) else len(self.open(split))
                          for split in self.splits}}

  def _document(self, place, example: Example, seed) -> Document:
    def parts():
      with decoding(place, 'cannot be tokenized'):
        yield from self.prepare(self.tokenizer.pieces(example), seed, example.get('task'))
    return Document(parts)

  def _by_index(self, function, examples, index, seed):
    return function(functools.partial(self.place, examples, index), examples[index], seed)

  def _ordered(self, split, function) -> grain.IterDataset:
    """Maps `function(place, example, seed)` over all examples."""
    examples = self.open(split)
    if isinstance(examples, Stream):
      return examples.map(lambda example: function(self.source.where, example, (0,)))
    indices = grain.MapDataset.range(len(examples))
    indices = indices.map(lambda index: self._by_index(function, examples, index, (0, index)))
    return indices.to_iter_dataset(self.read_options())

  def _with_loss_mask(self, batch):
    return {**batch, 'loss_mask': (batch[self.target_segments] > 0).astype(np.float32)}


def joined(*parts: np.ndarray | list) -> np.ndarray:
  """<int32>[sum of lengths]. Avoids numpy's common type, which is 64 bits wide for lists."""
  return np.concatenate([np.asarray(part, np.int32) for part in parts])


def with_last(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bool]]:
  """Each piece, and whether it is the last."""
  pieces = iter(pieces)
  piece = next(pieces, None)
  while piece is not None:
    following = next(pieces, None)
    yield piece, following is None
    piece = following


def _entries(config, where, name):
  """(path, value) of every key `name` in `config` and the dicts inside it."""
  for key, value in config.items():
    if key == name:
      yield f'{where}.{key}', value
    elif hasattr(value, 'items'):
      yield from _entries(value, f'{where}.{key}', name)
