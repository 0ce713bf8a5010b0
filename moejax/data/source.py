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
import gzip
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Protocol

import grain
import numpy as np

from moejax.config import ConfigError, Explained, Registry, shown
from moejax.data import fingerprint
from moejax.ranges import Above, Below, NotEmpty

SOURCES = Registry('source')

# The part of the examples that is held out: neither split may be empty.
Share = Annotated[float, Above(0), Below(1)]
Path = Annotated[str, NotEmpty()]

Example = dict[str, Any]


class DataError(Explained, ValueError):
  """Data that cannot be read. The message names the file and the place in it, and what to do."""


class MissingPackage(Explained, ImportError):
  """A package that a source needs is not installed. The message says how to install it."""


class decoding:  # spelt like contextlib's context managers; a generator would take three times as long a record
  """`with decoding(path):` whatever a decoder raises in here becomes a DataError that begins with what it decoded.

  What has been said already passes: errors of data and of the config, and packages that are missing.

  Args:
    place: file and record; a function where it takes time to find.
    broken: what the file or record then is.
    advice: a sentence, what to do.
  """

  def __init__(self, place: str | Callable[[], str], broken: str = 'cannot be read', advice: str = ''):
    self._about = place, broken, advice

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind, error, traceback) -> None:
    if isinstance(error, Exception) and not isinstance(error, (DataError, ConfigError, ImportError, StopIteration)):
      place, broken, advice = self._about
      cause = error
      while cause.__cause__ is not None:
        cause = cause.__cause__
      reason = (str(cause).splitlines() or [''])[0][:200]
      raise DataError(f'{place if isinstance(place, str) else place()}: {broken} ({type(cause).__name__}: {reason}). '
                      f'{advice}'.rstrip()) from error


class Examples(Protocol):
  """Random access to the examples of one split. Those of files may have `place(index)`: file and record, for errors."""

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

  Config keys that several sources have:
    test_examples: how many examples are the test split.
    test_fraction: which share of all examples is the test split.
    split_seed: draws which ones those are, whatever the seed of a run.
    train_examples: how many examples are made for the training split.
    data_seed: draws what is made, whatever the seed of a run.
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

  def rows(self, indices: np.ndarray | slice) -> dict[str, np.ndarray]:
    return {name: array[indices] for name, array in self._arrays.items()}


class Subset:
  """Those of `examples` that `indices` names."""

  def __init__(self, examples: Examples, indices: np.ndarray):
    self._examples, self._indices = examples, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._examples[int(self._indices[index])]

  def place(self, index: int) -> str:
    return place(self._examples, int(self._indices[index]))


def place(examples: Examples, index: int) -> str:
  """Where an example lies, for errors: in which file and where there, if `examples` can tell."""
  tell = getattr(examples, 'place', None)
  return f'example {index}' if tell is None else tell(index)


def columns(examples: Examples, indices: np.ndarray) -> Mapping[str, Sequence | np.ndarray]:
  """The named examples, field by field: arrays with a leading axis where the source has them, else lists."""
  if isinstance(examples, Arrays):
    return examples.rows(indices)
  return transpose([examples[int(index)] for index in indices])


def transpose(examples: Sequence[Example]) -> dict[str, list]:
  """A list of dicts as a dict of lists. Raises DataError where not all have the fields of the first."""
  with decoding('an example', 'lacks a field that others have'):
    return {name: [example[name] for example in examples] for name in (examples[0] if examples else ())}


def whole_numbers(values) -> np.ndarray:
  """<int64>[...] of whole numbers. Raises TypeError for anything else: numpy would cut fractions off, and wrap."""
  array = np.asarray(values)
  if array.size and array.dtype.kind not in 'biu':
    raise TypeError(f'{str(values)[:40]} is not made of whole numbers')
  return array.astype(np.int64)


def holdout(count: int, test: int | float, seed: int, key: str, advice: str = '') -> dict[str, np.ndarray]:
  """Indices of `train` and `test`: `test` of `count` examples (or that share) drawn by `seed`, each in order.

  Raises DataError where one would be empty: `key` is the config path of `test`, `advice` what else can be done.
  """
  size = round(test * count) if isinstance(test, float) else test
  if not 0 < size < count:
    remedy = f'Hold out 1 to {count - 1} of them' if count > 1 else 'Two examples are the least'
    raise DataError(f'{key} = {test} holds out {size} of {count} examples for the test split: one split would be '
                    f'empty. {remedy}{advice}.')
  order = np.random.default_rng(seed).permutation(count)
  return {'train': np.sort(order[size:]), 'test': np.sort(order[:size])}


class Files(Source):
  """Files of examples.

  Subclasses are dataclasses with the fields `where`, `files`, `test_fraction` and `split_seed`, and read a list of
  paths.

  Config keys:
    files: a file, a folder, or a pattern in which `*` stands for any part of a name (`**/` for any folders), whose
      examples are split here; or `dict(train=..., test=...)`, one a split.
  """
  files: Path | Annotated[Mapping, NotEmpty()]
  test_fraction: float
  split_seed: int

  def __post_init__(self):
    if not isinstance(self.files, str):
      check_strings(self.files, f'{self.where}.files')

  @property
  def splits(self) -> tuple[str, ...]:
    return ('train', 'test') if isinstance(self.files, str) else tuple(self.files)

  @abc.abstractmethod
  def read(self, paths: list[str]) -> Examples:
    """The examples of these files, in order."""

  def open(self, split: str) -> Examples:
    self.check_split(split)
    if isinstance(self.files, str):
      count, key = len(self._everything), f'{self.where}.test_fraction'
      indices = holdout(count, float(self.test_fraction), self.split_seed, key,
                        f', or name files for each split: {self.where}.files is {self.files!r}, and may be '
                        'dict(train=..., test=...)')
      return Subset(self._everything, indices[split])
    return self.read(expand(self.files[split], f'{self.where}.files.{split}'))

  def fingerprint(self, split: str, examples: Any) -> dict[str, str]:
    pattern = self.files if isinstance(self.files, str) else self.files[split]
    return {'examples': str(len(examples)), **fingerprint.of_files(expand(pattern, f'{self.where}.files'))}

  @functools.cached_property
  def _everything(self) -> Examples:
    return self.read(expand(str(self.files), f'{self.where}.files'))


def check_strings(config: Mapping, where: str) -> None:
  """Raises ConfigError where a value of `config` is not a string with something in it."""
  for key, value in config.items():
    if not isinstance(value, str) or not value:
      raise ConfigError(f'{where}.{key} must be a string that is not empty, not {shown(value)}.')


def local_path(path: str, where: str) -> str:
  """`path` on this machine; `~` is the home folder. Raises DataError for a URL."""
  if re.match(r'[A-Za-z][\w+.-]*://', path):
    raise DataError(f'{where}: {path} is a URL, and only files of this machine are read. Copy the data to a disk '
                    '(gcloud storage cp, aws s3 sync), mount the bucket (gcsfuse, s3fs), or use the source '
                    "'huggingface' or 'tfds'.")
  return os.path.expanduser(path)


def expand(pattern: str, where: str) -> list[str]:
  """The files that a path, a folder or a pattern with `*` names, sorted. Raises DataError if there are none."""
  path = local_path(pattern, where)
  if os.path.isdir(path):
    matching = os.path.join(glob.escape(path), '*')
  elif os.path.isfile(path):
    matching = glob.escape(path)
  else:
    matching = '*'.join(map(glob.escape, path.split('*')))  # names may hold brackets
  paths = sorted(found for found in glob.glob(matching, recursive=True) if os.path.isfile(found))
  if not paths:
    raise DataError(f'{where}: there is no file {path!r}. Check the path; `*` stands for any part of a name.')
  return paths


def read_file(path: str) -> bytes:
  """All of a file, unpacked if it ends in `.gz`. Raises DataError where it cannot be read."""
  zipped = path.endswith('.gz')
  with decoding(path, *(('broken gzip file', 'Download it again.') if zipped else ())):
    with (gzip.open if zipped else open)(path, 'rb') as file:
      return file.read()


def require(module: str, package: str, needed_by: str, extra: str = 'data') -> Any:
  """Imports `module`. Raises ImportError that names `package` and the extra to install."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise MissingPackage(f"{needed_by} needs the package {package}, which cannot be imported ({error}): "
                      f"pip install 'moejax[{extra}]'.") from error
