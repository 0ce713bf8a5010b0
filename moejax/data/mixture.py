"""Mixtures of sources whose examples carry the `task` they came from; and text that comes with installed software."""
import bisect
import dataclasses
import functools
import glob
import os
import tokenize
from typing import Annotated, Any

from moejax.config import config_path
from moejax.data.source import SOURCES, DataError, Share, Source, Stream, decoding, holdout, place, require
from moejax.data.text_files import TextDocuments
from moejax.ranges import Natural, NotEmpty

# Three domains of human-written text, about 12, 11 and 0.5 million characters, on any machine with moejax[data].
DOMAINS = dict(code=dict(name='python_library'), dialogue=dict(name='chitchat'), prose=dict(name='python_prose'))


@SOURCES('mixture')
class SourceMixture(Source):
  """The examples of several sources, concatenated, each with its `task`.

  Config keys:
    sources: `{name: source}`; the default is `DOMAINS`. A task's id is the index of its name in alphabetical order.
  """

  def __init__(self, *, sources: Annotated[dict, NotEmpty()] = DOMAINS):
    self.where, self.tasks = config_path(), tuple(sorted(sources))
    self._sources = [SOURCES.build(sources[name], f'.sources.{name}') for name in self.tasks]
    self.splits = tuple(split for split in self._sources[0].splits
                        if all(split in source.splits for source in self._sources))

  def open(self, split: str) -> 'Mixed':
    """Also raises DataError where a source can only be read in order."""
    self.check_split(split)
    parts = [source.open(split) for source in self._sources]
    for source, part in zip(self._sources, parts):
      if isinstance(part, Stream) or not len(part):
        raise DataError(f'{source.where}: a mixture requires sources with random access, and at least one example in '
                        f'{split!r}.')
    return Mixed(parts)

  def fingerprint(self, split: str, examples: Any) -> dict[str, str]:
    return {f'{task}: {part}': found
            for task, source, labelled in zip(self.tasks, self._sources, examples.parts)
            for part, found in source.fingerprint(split, labelled.examples).items()}


class Mixed:
  """The examples of `parts`, concatenated; `task` is the index of the part an example is from."""

  def __init__(self, parts: list):
    self.parts = [Labelled(part, task) for task, part in enumerate(parts)]
    self._starts = [sum(map(len, parts[:index])) for index in range(len(parts) + 1)]

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, index: int) -> dict[str, Any]:
    part, index = self._find(index)
    return part[index]

  def place(self, index: int) -> str:
    part, index = self._find(index)
    return part.place(index)

  def _find(self, index):
    which = bisect.bisect_right(self._starts, index) - 1
    return self.parts[which], index - self._starts[which]


@dataclasses.dataclass(frozen=True)
class Labelled:
  """The examples of one source, each with `task`."""
  examples: Any
  task: int

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self.examples[index], 'task': self.task}

  def place(self, index: int) -> str:
    return f'task {self.task}, {place(self.examples, index)}'


class _Installed(Source):
  """Documents that came with installed software: `texts`, of which a part is held out."""
  where: str = dataclasses.field(init=False, default_factory=config_path)
  test_fraction: float
  split_seed: int
  texts: Any  # a cached property

  def open(self, split):
    self.check_split(split)
    chosen = holdout(len(self.texts), float(self.test_fraction), self.split_seed, f'{self.where}.test_fraction')[split]
    return TextDocuments([self.texts[index] for index in chosen])


@SOURCES('python_library')
@dataclasses.dataclass(frozen=True)
class PythonLibrary(_Installed):
  """The modules of the running Python's standard library, about 700, without its tests."""
  where: str = dataclasses.field(init=False, default_factory=config_path)
  test_fraction: Share = 0.1
  split_seed: Natural = 0

  @functools.cached_property
  def texts(self) -> list[str]:
    folder = os.path.dirname(os.__file__)
    paths = sorted(glob.glob(os.path.join(folder, '**', '*.py'), recursive=True))
    return [text for path in paths if not _foreign(os.path.relpath(path, folder)) if (text := _source_text(path))]


@SOURCES('python_prose')
@dataclasses.dataclass(frozen=True)
class PythonProse(_Installed):
  """English prose in pieces of whole paragraphs: Python's language reference, as `help` prints it, and scikit-learn's
  descriptions of its data sets."""
  where: str = dataclasses.field(init=False, default_factory=config_path)
  test_fraction: Share = 0.1
  split_seed: Natural = 0

  @functools.cached_property
  def texts(self) -> list[str]:
    topics = require('pydoc_data.topics', 'python', 'The source python_prose').topics
    package = require('sklearn', 'scikit-learn', 'The source python_prose')
    paths = sorted(glob.glob(os.path.join(os.path.dirname(package.__file__), 'datasets', 'descr', '*.rst')))
    texts = [topics[name] for name in sorted(topics)]
    for path in paths:
      with decoding(path), open(path, encoding='utf-8') as file:
        texts.append(file.read())
    return [text for whole in texts for text in _paragraphs(whole)]


def _foreign(path: str) -> bool:
  folders = path.split(os.sep)[:-1]
  return any(folder in ('site-packages', 'test', 'tests', 'idle_test') for folder in folders)


def _source_text(path: str) -> str:
  with decoding(path), tokenize.open(path) as file:  # uses the encoding that the file declares
    return file.read()


def _paragraphs(text: str, least: int = 1000) -> list[str]:
  """`text` in pieces of whole paragraphs, each (but the last) of `least` characters or a little more."""
  pieces, piece = [], ''
  for paragraph in text.split('\n\n'):
    piece += paragraph + '\n\n'
    if len(piece) >= least:
      pieces, piece = [*pieces, piece], ''
  return pieces + [piece] * bool(piece.strip())
