"""moejax's own file format: ArrayRecord shards of msgpack dicts, written by `pack.py`."""
import bisect
import dataclasses
import json
import os
import re
from typing import Annotated, Any

import grain
import msgpack
import numpy as np

from moejax.config import config_path
from moejax.data.files import Path, local_path, read_file
from moejax.data.source import SOURCES, DataError, Example, Source, decoding, require
from moejax.ranges import Count, NotEmpty

INFO = 'info.json'


@SOURCES('array_record')
@dataclasses.dataclass(frozen=True)
class ArrayRecord(Source):
  """A folder written by `python -m moejax.data.pack`: `<split>-<shard>-of-<shards>.array_record` and `info.json`.

  Config keys:
    path: the folder.
    splits: the splits in it.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  path: Path
  splits: Annotated[tuple[str, ...], NotEmpty()] = ('train', 'test')
  num_classes: Count | None = None

  def open(self, split):
    self.check_split(split)
    folder = local_path(self.path, f'{self.where}.path')
    shard = re.compile(re.escape(split) + r'-\d+-of-\d+\.array_record')
    names = sorted(filter(shard.fullmatch, os.listdir(folder) if os.path.isdir(folder) else ()))
    if not names:
      raise DataError(f'{self.where}.path: there is no file {os.path.join(folder, split)}-*.array_record. '
                      'Write it with: python -m moejax.data.pack.')
    examples = Records([os.path.join(folder, name) for name in names])
    info = os.path.join(folder, INFO)
    if not os.path.exists(info):
      raise DataError(f'{folder} has no {INFO}: packing was interrupted. Delete the folder and pack again.')
    with decoding(info, f'does not hold the number of examples in {split!r}', 'Pack or copy the data again.'):
      expected = json.loads(read_file(info))['examples'][split]
    if len(examples) != expected:
      raise DataError(f'{folder}: {len(examples)} examples in split {split!r}, but {INFO} says {expected}. '
                      f'Shards are missing, or foreign ones are among them; pack or copy the data again.')
    return examples


class Records:
  """Examples in ArrayRecord files."""

  def __init__(self, paths: list[str]):
    require('array_record.python.array_record_data_source', 'array_record', 'The source array_record')
    self._paths, self._ends = paths, np.cumsum([_count(path) for path in paths]).tolist()
    self._records: Any = grain.sources.ArrayRecordDataSource(paths)

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    with decoding(lambda: self.place(index), 'cannot be read; the file is corrupt', 'Pack or copy it again.'):
      example = decode(self._records[index])
      if not isinstance(example, dict):
        raise TypeError(f'{type(example).__name__} in place of an example')
      return example

  def place(self, index: int) -> str:
    """The shard, and the record's index in it."""
    shard = bisect.bisect_right(self._ends, index)
    return f'{self._paths[shard]}, record {index - (self._ends[shard - 1] if shard else 0)}'


def writer(path: str):
  """A writer with `write(bytes)` and `close()`. Each record is its own chunk, for fast random access."""
  module = require('array_record.python.array_record_module', 'array_record', 'Packing')
  return module.ArrayRecordWriter(path, 'group_size:1')


def encode(example: Example) -> bytes:
  """Serializes one example of arrays, numbers, strings and bytes. Inverse of `decode`."""
  packed: Any = msgpack.packb(example, default=_pack, use_bin_type=True)
  return packed


def decode(record: bytes) -> Example:
  """The example that `encode` wrote."""
  return msgpack.unpackb(record, ext_hook=_unpack, raw=False)


_ARRAY = 1  # our msgpack extension type


def _pack(value):
  array = np.asarray(value)
  if array.dtype.hasobject:
    raise TypeError(f'an example must hold arrays, numbers, strings or bytes, not {type(value).__name__}')
  return msgpack.ExtType(_ARRAY, msgpack.packb([array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()]))


def _unpack(code, data):
  if code != _ARRAY:
    raise ValueError(f'unknown extension type {code}: not written by moejax.data.pack')
  dtype, shape, raw = msgpack.unpackb(data)
  array = np.frombuffer(raw, dtype).reshape(shape)
  return array if shape else array[()]


def _count(path):
  """The number of records in a file; reads only its header and index."""
  module = require('array_record.python.array_record_module', 'array_record', 'The source array_record')
  with decoding(path, 'not a complete ArrayRecord file', 'Pack or copy it again.'):
    reader = module.ArrayRecordReader(path)
    try:
      return reader.num_records()
    finally:
      reader.close()
