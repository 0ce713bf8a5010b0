"""Documents: the chitchat dialogues, plain text files and JSON lines."""
import bisect
import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np

from moejax.config import config_path
from moejax.data.files import Files, Path, read_file
from moejax.data.source import SOURCES, DataError, Share, Source, decoding, holdout, require
from moejax.ranges import Natural, NotEmpty

_BYTE_ORDER_MARK = '\ufeff'.encode('utf-8')
_BLOCK = 1 << 22
# ASCII white space, without the line feed.
_BLANK = np.isin(np.arange(256), list(b' \t\r\v\f'))


@SOURCES('chitchat')
@dataclasses.dataclass(frozen=True)
class Chitchat(Source):
  """7,168 dialogues between people, 12.6 million characters, from the package chitchat-dataset (MIT).

  A document is one dialogue; a line is one speaker's turn. Each dialogue is in only one split.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  test_fraction: Share = 0.1
  split_seed: Natural = 0

  def open(self, split):
    self.check_split(split)
    documents = self._everything
    chosen = holdout(len(documents), float(self.test_fraction), self.split_seed, f'{self.where}.test_fraction')[split]
    return TextDocuments([documents[index] for index in chosen])

  @functools.cached_property
  def _everything(self):
    package = require('chitchat_dataset', 'chitchat-dataset', 'The source chitchat')
    path = os.path.join(os.path.dirname(package.__file__), 'dataset.json')
    with decoding(path, 'not the dialogues of chitchat-dataset', 'Reinstall it.'):
      dialogues = json.loads(read_file(path)).values()
      documents = (dialogue_text(dialogue['messages']) for dialogue in dialogues)
      return [document for document in documents if document]


def dialogue_text(turns) -> str:
  """One line per turn; a turn is a list of messages, and runs of white space in it become single spaces."""
  lines = (' '.join(' '.join(message['text'] for message in turn).split()) for turn in turns)
  return '\n'.join(line for line in lines if line)


class TextDocuments:
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
  """Text files in UTF-8, plain or `.gz`.

  Config keys:
    document: 'file', one document per file, or 'line', one per line that is not blank.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  files: Path | Annotated[Mapping, NotEmpty()]
  document: Literal['file', 'line'] = 'file'
  test_fraction: Share = 0.1
  split_seed: Natural = 0

  def read(self, paths):
    return WholeFiles(paths) if self.document == 'file' else TextLines(paths)


class WholeFiles:
  """One document per file."""

  def __init__(self, paths: list[str]):
    self._paths = paths

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    path = self._paths[index]
    return {'text': decode(read_file(path).removeprefix(_BYTE_ORDER_MARK), path)}

  def place(self, index):
    return self._paths[index]


@SOURCES('jsonl')
@dataclasses.dataclass(frozen=True)
class JsonLinesFiles(Files):
  """One JSON object per line, plain or `.gz`.

  Config keys:
    field: its string field that is the document.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  files: Path | Annotated[Mapping, NotEmpty()]
  field: str = 'text'
  test_fraction: Share = 0.1
  split_seed: Natural = 0

  def read(self, paths):
    return JsonDocuments(paths, self.field)


class Lines:
  """The lines of files that are not blank, by index.

  Lines of plain files are read on demand; `.gz` files are held decompressed in memory.
  """

  def __init__(self, paths: list[str]):
    self._files = [_Unpacked(path) if path.endswith('.gz') else _OnDisk(path) for path in paths]
    self._starts = [_line_starts(file) for file in self._files]
    self._ends = np.cumsum([len(starts) for starts in self._starts]).tolist()

  def __len__(self):
    return self._ends[-1]

  def line(self, index: int) -> tuple[bytes, str, int]:
    """The line, its file, and the byte offset of its start."""
    file, starts, number = self._find(index)
    stop = starts[number + 1] if number + 1 < len(starts) else file.size
    raw = file.read(int(starts[number]), int(stop))
    end = raw.find(b'\n')
    return raw[:end] if end >= 0 else raw, file.path, int(starts[number])

  def place(self, index: int) -> str:
    """The file, and the line number, from 1 as in editors."""
    file, starts, number = self._find(index)
    before = sum(block.count(b'\n') for _, block in _blocks(file, int(starts[number])))
    return f'{file.path}, line {before + 1}'

  def _find(self, index):
    which = bisect.bisect_right(self._ends, index)
    starts = self._starts[which]
    return self._files[which], starts, index - (self._ends[which] - len(starts))


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
    text = decode(*self.line(index))
    with decoding(lambda: self.place(index), 'not valid JSON'):
      record = json.loads(text)
    if not isinstance(record, dict):
      has = f'{_kind(record)} in place of an object'
    elif self._field not in record:
      has = ', '.join(record) or 'no fields'
    elif not isinstance(record[self._field], str):
      has = f'{_kind(record[self._field])} there'
    else:
      return {'text': record[self._field]}
    raise DataError(f"{self.place(index)}: no string {self._field!r}; it has {has}. Set the source's `field`, or "
                    'remove the line.')


def decode(raw: bytes, path: str, start: int = 0) -> str:
  """Raises DataError where `raw`, from byte `start` of the file `path`, is not UTF-8."""
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise DataError(f'{path}: byte {start + error.start} is not UTF-8 ({error.reason}). Convert the file.') from error


class _OnDisk:
  """The bytes of a file, read on demand. Not memory-mapped: truncating a mapped file kills the process."""

  def __init__(self, path: str):
    with decoding(path):
      self._file = open(path, 'rb', buffering=0)
    self.path, self.size = path, os.fstat(self._file.fileno()).st_size

  def read(self, start: int, stop: int) -> bytes:
    parts = []
    while start < stop:
      with decoding(self.path):
        part = os.pread(self._file.fileno(), stop - start, start)  # 2 GiB at most
      if not part:
        raise DataError(f'{self.path}: byte {start} is missing: the file was truncated after it was opened. Restore it '
                        'and start again.')
      parts.append(part)
      start += len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)


class _Unpacked:
  """The bytes of a `.gz` file."""

  def __init__(self, path: str):
    self.path, self._raw = path, read_file(path)
    self.size = len(self._raw)

  def read(self, start: int, stop: int) -> bytes:
    return self._raw[start:stop]


def _blocks(file, size):
  for at in range(0, size, _BLOCK):
    yield at, file.read(at, min(at + _BLOCK, size))


def _line_starts(file) -> np.ndarray:
  """<int64>[lines]: the starts of the lines that are not blank; a byte order mark belongs to no line."""
  mark = file.read(0, min(file.size, len(_BYTE_ORDER_MARK))) == _BYTE_ORDER_MARK
  begin, filled = len(_BYTE_ORDER_MARK) * mark, False  # of the line that is still open
  found = []
  for at, block in _blocks(file, file.size):
    if mark and not at:
      block = b' ' * len(_BYTE_ORDER_MARK) + block[len(_BYTE_ORDER_MARK):]
    values = np.frombuffer(block + b' ', np.uint8)  # one more space, so that every line has a byte in it
    ends = np.flatnonzero(values == ord('\n'))
    held = ~_BLANK[values]
    held[ends] = False
    has = np.logical_or.reduceat(held, np.append(0, ends + 1))
    has[0] |= filled
    begins = np.append(begin, at + ends + 1)
    found.append(begins[:-1][has[:-1]])
    begin, filled = begins[-1], has[-1]
  return np.concatenate([*found, [begin] * bool(filled)]).astype(np.int64)


def _kind(value):
  return {type(None): 'null', dict: 'object', str: 'string', bool: 'truth value', int: 'number', float: 'number'}.get(
      type(value), type(value).__name__)
