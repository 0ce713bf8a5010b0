"""Documents: the chitchat dialogues, plain text files and JSON lines."""
import bisect
import dataclasses
import functools
import gzip
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

from moejax.data.source import SOURCES, DataError, Files, Source, holdout, require


@SOURCES('chitchat')
@dataclasses.dataclass(frozen=True)
class Chitchat(Source):
  """7,168 dialogues between people, 12.6 million characters, inside the package chitchat-dataset (MIT).

  A document is one dialogue; a line is what one speaker says before the other answers. Dialogues are in one split
  each.
  """
  where: str
  test_fraction: float = 0.1
  split_seed: int = 0

  def open(self, split):
    self.check_split(split)
    documents = self._everything
    chosen = holdout(len(documents), float(self.test_fraction), self.split_seed)[split]
    return Documents([documents[index] for index in chosen])

  @functools.cached_property
  def _everything(self):
    package = require('chitchat_dataset', 'chitchat-dataset', 'The source chitchat')
    with open(os.path.join(os.path.dirname(package.__file__), 'dataset.json'), encoding='utf-8') as file:
      dialogues = json.load(file).values()
    documents = (dialogue_text(dialogue['messages']) for dialogue in dialogues)
    return [document for document in documents if document]


def dialogue_text(turns) -> str:
  """One line a turn; a turn is a list of messages, and whitespace inside it is single spaces."""
  lines = (' '.join(' '.join(message['text'] for message in turn).split()) for turn in turns)
  return '\n'.join(line for line in lines if line)


class Documents:
  """Texts in memory."""

  def __init__(self, texts: list[str]):
    self._texts = texts

  def __len__(self):
    return len(self._texts)

  def __getitem__(self, index):
    return {'text': self._texts[index]}


@SOURCES('text')
@dataclasses.dataclass(frozen=True)
class Text(Files):
  """Text files in UTF-8. A document is a whole file, or a line that is not empty.

  Config:
    files: a path or pattern, of which a part becomes the test split; or one for each split.
    document: what a document is.
  """
  where: str
  files: str | Mapping
  document: Literal['file', 'line'] = 'file'
  test_fraction: float = 0.1
  split_seed: int = 0

  def read(self, paths):
    return WholeFiles(paths) if self.document == 'file' else TextLines(paths)


class WholeFiles:
  """A document a file."""

  def __init__(self, paths: list[str]):
    self._paths = paths

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    with open(self._paths[index], 'rb') as file:
      return {'text': decode(file.read(), self._paths[index])}


@SOURCES('jsonl')
@dataclasses.dataclass(frozen=True)
class JsonLines(Files):
  """One JSON object a line, plain or `.gz`; the document is the string in `field`.

  Config:
    files: a path or pattern, of which a part becomes the test split; or one for each split.
    field: key of the text in each object.
  """
  where: str
  files: str | Mapping
  field: str = 'text'
  test_fraction: float = 0.1
  split_seed: int = 0

  def read(self, paths):
    return JsonDocuments(paths, self.field)


class Lines:
  """The lines of files that are not empty, by index. Plain files are mapped, not read; `.gz` ones are held unpacked."""

  def __init__(self, paths: list[str]):
    self._paths = paths
    self._buffers = [_buffer(path) for path in paths]
    self._starts = [_line_starts(buffer) for buffer in self._buffers]
    self._ends = np.cumsum([len(starts) for starts in self._starts]).tolist()

  def __len__(self):
    return self._ends[-1]

  def line(self, index: int) -> tuple[bytes, str, int]:
    """The line, its file, and the byte that it starts at."""
    which = bisect.bisect_right(self._ends, index)
    buffer, starts = self._buffers[which], self._starts[which]
    start = int(starts[index - (self._ends[which] - len(starts))])
    end = buffer.find(b'\n', start)
    return buffer[start:end if end >= 0 else len(buffer)], self._paths[which], start

  def line_number(self, path: str, start: int) -> int:
    """Counted from 1, as editors do."""
    return self._buffers[self._paths.index(path)][:start].count(b'\n') + 1


class TextLines(Lines):
  """Each line is a document."""

  def __getitem__(self, index):
    line, path, start = self.line(index)
    return {'text': decode(line.rstrip(b'\r'), path, start)}


class JsonDocuments(Lines):
  """Each line is a JSON object, one field of which is the document."""

  def __init__(self, paths, field: str):
    super().__init__(paths)
    self._field = field

  def __getitem__(self, index):
    line, path, start = self.line(index)
    try:
      record = json.loads(line)
    except ValueError as error:
      raise DataError(f'{path}, line {self.line_number(path, start)}: not valid JSON ({error}).') from error
    if not isinstance(record, dict) or not isinstance(record.get(self._field), str):
      has = ', '.join(record) if isinstance(record, dict) else type(record).__name__
      raise DataError(f'{path}, line {self.line_number(path, start)}: no string {self._field!r}; it has {has}. '
                      'Set the source\'s `field`.')
    return {'text': record[self._field]}


def decode(raw: bytes, path: str, start: int = 0) -> str:
  """Raises DataError where `raw`, from byte `start` of the file `path`, is not UTF-8."""
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise DataError(f'{path}: byte {start + error.start} is not UTF-8 ({error.reason}). Convert the file.') from error


def _buffer(path):
  if path.endswith('.gz'):
    try:
      with gzip.open(path) as file:
        return file.read()
    except (EOFError, OSError, zlib.error) as error:
      raise DataError(f'{path}: broken gzip file ({error}). Download it again.') from error
  with open(path, 'rb') as file:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b''


def _line_starts(buffer, block=1 << 26) -> np.ndarray:
  newlines = [np.flatnonzero(np.frombuffer(buffer[at:at + block], np.uint8) == ord('\n')) + at
              for at in range(0, len(buffer), block)]
  ends = np.concatenate([*newlines, [len(buffer)]]).astype(np.int64)
  starts = np.concatenate([[0], ends[:-1] + 1])
  return starts[ends > starts]
