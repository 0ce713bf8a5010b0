"""Sources: where examples come from, as random access by index.

An example is a dict with either
    image  uint8 in [0, 255] or float in [0, 1], [H,W] or [H,W,C]; or the bytes of a JPEG or PNG file
    label  a whole number, or a sequence of them (multi-label)
    text   str, a caption, where the source has them
or  text   str, one document
or  tokens <int32>[n], one document that is tokenized already
or  frames <float32>[n,C], features of a recording
    text   str, what is said in it

and, where the source has `tasks`, `task`: which of them the example is of.

Constructing a source touches no file, so that configs whose data is elsewhere can be built and traced; `open` reads.
"""
import abc
import functools
import glob
import importlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import grain
import numpy as np

from moejax.config import ConfigError, Explained, Registry
from moejax.data import fingerprint

SOURCES = Registry('source')

Example = dict[str, Any]


class DataError(Explained, ValueError):
  """Data that cannot be read. The message names the file and the place in it, and what to do."""


class MissingPackage(Explained, ImportError):
  """A package that a source needs is not installed. The message says how to install it."""


class Examples(Protocol):
  """Random access to the examples of one split."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


class Stream(grain.IterDataset, abc.ABC):
  """One pass over the examples of a split that can only be read in order. Its iterators have exact states.

  Attributes:
    shuffle_window: how many consecutive examples are shuffled among themselves in training.
  """
  shuffle_window: int

  @abc.abstractmethod
  def shard(self, index: int, count: int) -> 'Stream':
    """The part of process `index`; the `count` parts are disjoint and cover the stream."""


class Source(abc.ABC):
  """One data set.

  Attributes:
    where: config path.
    splits: names that `open` knows.
    num_classes: labels are below it; None where there are no labels.
    tasks: names of the tasks, domains or languages that the examples are of; () where they do not say.

  Config that several sources have:
    test_examples: how many examples are the test split.
    test_fraction: which share of all documents is the test split.
    split_seed: draws which ones those are.
    train_examples: how many examples are made for the training split.
    data_seed: draws what is made.
  """
  where: str
  splits: tuple[str, ...] = ('train', 'test')
  num_classes: int | None = None
  tasks: tuple[str, ...] = ()

  @abc.abstractmethod
  def open(self, split: str) -> Examples | Stream:
    """The examples of one of `splits`.

    Raises:
      DataError: a file is missing or broken.
      ImportError: a package that the source needs is not installed.
    """

  def fingerprint(self, split: str, examples: Examples | Stream) -> dict[str, str]:
    """What tells whether a split, of which `examples` are what `open` gave, is still the same; {} for a stream."""
    del split
    return {} if isinstance(examples, Stream) else fingerprint.of_examples(examples)

  def check_split(self, split: str) -> None:
    """Raises ConfigError where there is no such split."""
    if split not in self.splits:
      raise ConfigError(f'{self.where}: there is no split {split!r}. Allowed: {", ".join(self.splits)}.')


class Arrays:
  """Examples as rows of arrays in memory; `rows` takes many at once."""

  def __init__(self, **arrays: np.ndarray):
    self._arrays = arrays
    self._length = len(next(iter(arrays.values())))

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Example:
    return {name: array[index] for name, array in self._arrays.items()}

  def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[indices] for name, array in self._arrays.items()}


class Subset:
  """Those of `examples` that `indices` names."""

  def __init__(self, examples: Examples, indices: np.ndarray):
    self._examples, self._indices = examples, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._examples[int(self._indices[index])]


def columns(examples: Examples, indices: np.ndarray) -> dict[str, Sequence]:
  """The named examples, field by field: arrays with a leading axis where the source has them, else lists."""
  if isinstance(examples, Arrays):
    return examples.rows(indices)
  return transpose([examples[int(index)] for index in indices])


def transpose(examples: Sequence[Example]) -> dict[str, list]:
  """A list of dicts as a dict of lists."""
  return {name: [example[name] for example in examples] for name in (examples[0] if examples else ())}


def holdout(count: int, test: int | float, seed: int) -> dict[str, np.ndarray]:
  """Indices of `train` and `test`: `test` of `count` examples (or that fraction) drawn by `seed`, each in order."""
  size = round(test * count) if isinstance(test, float) else test
  if not 0 < size < count:
    raise DataError(f'{size} of {count} examples cannot be held out for the test split: one split would be empty.')
  order = np.random.default_rng(seed).permutation(count)
  return {'train': np.sort(order[size:]), 'test': np.sort(order[:size])}


class Files(Source):
  """Files of examples. `files` is a pattern a split, or one pattern whose examples are split here.

  Subclasses are dataclasses with the fields `where`, `files`, `test_fraction` and `split_seed`, and read a list of
  paths.
  """
  files: str | Mapping
  test_fraction: float
  split_seed: int

  @property
  def splits(self) -> tuple[str, ...]:
    return ('train', 'test') if isinstance(self.files, str) else tuple(self.files)

  @abc.abstractmethod
  def read(self, paths: list[str]) -> Examples:
    """The examples of these files, in order."""

  def open(self, split: str) -> Examples:
    self.check_split(split)
    if isinstance(self.files, str):
      indices = holdout(len(self._everything), float(self.test_fraction), self.split_seed)
      return Subset(self._everything, indices[split])
    return self.read(expand(self.files[split], f'{self.where}.files.{split}'))

  def fingerprint(self, split, examples):
    pattern = self.files if isinstance(self.files, str) else self.files[split]
    return {'examples': str(len(examples)), **fingerprint.of_files(expand(pattern, f'{self.where}.files'))}

  @functools.cached_property
  def _everything(self) -> Examples:
    return self.read(expand(self.files, f'{self.where}.files'))


def expand(pattern: str, where: str) -> list[str]:
  """The files that a path, a folder or a pattern with `*` names, sorted. Raises DataError if there are none."""
  pattern = os.path.expanduser(pattern)
  paths = glob.glob(os.path.join(pattern, '*') if os.path.isdir(pattern) else pattern, recursive=True)
  paths = sorted(path for path in paths if os.path.isfile(path))
  if not paths:
    raise DataError(f'{where}: there is no file {pattern!r}. Check the path; `*` stands for any part of a name.')
  return paths


def require(module: str, package: str, needed_by: str, extra: str = 'data') -> ModuleType:
  """Imports `module`. Raises ImportError that names `package` and the extra to install."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise MissingPackage(f"{needed_by} needs the package {package}, which cannot be imported ({error}): "
                      f"pip install 'moejax[{extra}]'.") from error
