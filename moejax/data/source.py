"""Sources: examples with random access by index.

An example is a dict with either
    image  uint8 in [0, 255] or float in [0, 1], [H,W] or [H,W,C]; or the bytes of a JPEG or PNG file
    label  an int, or a sequence of ints (multi-label)
    text   str, a caption, if the source has captions
or  text   str, one document
or  tokens <int32>[n], one tokenized document
or  frames <float32>[n,C], features of a recording
    text   str, its transcript

and `task`, the example's index into `tasks`, if the source has tasks.

Constructing a source touches no file, so configs can be built and traced where their data is missing; `open` reads.
"""
import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Protocol

import grain
import numpy as np

from moejax.config import ConfigError, Explained, Registry
from moejax.data import fingerprint
from moejax.ranges import Above, Below

# Share of the examples that is held out: neither split may be empty.
Share = Annotated[float, Above(0), Below(1)]

Example = dict[str, Any]


class DataError(Explained, ValueError):
  """Unreadable data. The message names the file, the place in it, and what to do."""


class MissingPackage(Explained, ImportError):
  """A package that a source needs is not installed. The message says how to install it."""


class decoding:  # lower case like contextlib's; a generator would take three times as long per record
  """`with decoding(path):` turns any exception of a decoder into a DataError that begins with the path.

  Errors of data, of the config and of missing packages already explain themselves and pass unchanged.

  Args:
    place: file and record, or a function that finds them when finding them is slow.
    broken: the predicate of the error, such as 'cannot be read'.
    advice: a sentence that says what to do.
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
  """Random access to the examples of one split. May have `place(index)`: file and record, for errors."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


class Stream(grain.IterDataset, abc.ABC):
  """One pass over the examples of a split that can only be read in order. Its iterators have exact states.

  Attributes:
    shuffle_window: number of consecutive examples that are shuffled among themselves in training.
  """
  shuffle_window: int

  @abc.abstractmethod
  def shard(self, index: int, count: int) -> 'Stream':
    """Part `index` of `count` disjoint parts that cover the stream."""


class Source(abc.ABC):
  """One data set.

  Attributes:
    where: config path.
    splits: the splits that `open` accepts.
    num_classes: labels are below it; None without labels.
    tasks: names of the tasks, domains or languages of the examples; () if the examples have no `task`.

  Config keys that several sources have:
    test_examples: number of examples in the test split.
    test_fraction: share of all examples in the test split.
    split_seed: seed of the split, independent of the seed of a run.
    train_examples: number of examples generated for the training split.
    data_seed: seed of the generated data, independent of the seed of a run.
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
    """A fingerprint of a split, to detect changes; `examples` come from `open(split)`. {} for a stream."""
    del split
    return {} if isinstance(examples, Stream) else fingerprint.of_examples(examples)

  def check_split(self, split: str) -> None:
    """Raises ConfigError if there is no such split."""
    if split not in self.splits:
      raise ConfigError(f'{self.where}: there is no split {split!r}. Allowed: {", ".join(self.splits)}.')


SOURCES = Registry('source', Source)


class Arrays:
  """Examples as rows of arrays in memory; `rows` returns many at once."""

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
  """The `examples` at `indices`."""

  def __init__(self, examples: Examples, indices: np.ndarray):
    self._examples, self._indices = examples, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._examples[int(self._indices[index])]

  def place(self, index: int) -> str:
    return place(self._examples, int(self._indices[index]))


def place(examples: Examples, index: int) -> str:
  """Where an example lies, for errors: the file and place in it if `examples` know them, else the index."""
  tell = getattr(examples, 'place', None)
  return f'example {index}' if tell is None else tell(index)


def columns(examples: Examples, indices: np.ndarray) -> Mapping[str, Sequence | np.ndarray]:
  """The examples at `indices`, field by field: batched arrays where the source has arrays, else lists."""
  if isinstance(examples, Arrays):
    return examples.rows(indices)
  return transpose([examples[int(index)] for index in indices])


def transpose(examples: Sequence[Example]) -> dict[str, list]:
  """A list of dicts as a dict of lists. Raises DataError if one lacks a field of the first."""
  with decoding('an example', 'lacks a field that others have'):
    return {name: [example[name] for example in examples] for name in (examples[0] if examples else ())}


def whole_numbers(values) -> np.ndarray:
  """<int64>[...] of ints. Raises TypeError for anything else, since numpy would truncate fractions and wrap."""
  array = np.asarray(values)
  if array.size and array.dtype.kind not in 'biu':
    raise TypeError(f'{str(values)[:40]} is not made of ints')
  return array.astype(np.int64)


def holdout(count: int, test: int | float, seed: int, key: str, advice: str = '') -> dict[str, np.ndarray]:
  """Sorted indices of `train` and `test`: `test` (an int) of the `count` examples, or that share, drawn with `seed`.

  Raises DataError if a split would be empty: `key` is the config path of `test`, `advice` another remedy.
  """
  size = round(test * count) if isinstance(test, float) else test
  if not 0 < size < count:
    remedy = f'Hold out 1 to {count - 1} of them' if count > 1 else 'At least two examples are needed'
    raise DataError(f'{key} = {test} holds out {size} of {count} examples for the test split: one split would be '
                    f'empty. {remedy}{advice}.')
  order = np.random.default_rng(seed).permutation(count)
  return {'train': np.sort(order[size:]), 'test': np.sort(order[:size])}


def require(module: str, package: str, needed_by: str, extra: str = 'data') -> Any:
  """Imports `module`. Raises ImportError that names `package` and the extra to install."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise MissingPackage(f"{needed_by} needs the package {package}, which cannot be imported ({error}): "
                      f"pip install 'moejax[{extra}]'.") from error
