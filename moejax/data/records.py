"""moejax's own files: ArrayRecord shards whose records are msgpack dicts. `pack.py` writes them."""
import dataclasses
import glob
import json
import os

import grain
import msgpack
import numpy as np

from moejax.data.source import SOURCES, DataError, Example, Source, require

INFO = 'info.json'


@SOURCES('array_record')
@dataclasses.dataclass(frozen=True)
class ArrayRecord(Source):
  """A folder written by `python -m moejax.data.pack`: `<split>-<shard>-of-<shards>.array_record` and `info.json`.

  Config:
    path: the folder.
  """
  where: str
  path: str
  splits: tuple = ('train', 'test')
  num_classes: int | None = None

  def open(self, split):
    self.check_split(split)
    folder = os.path.expanduser(self.path)
    paths = sorted(glob.glob(os.path.join(folder, f'{glob.escape(split)}-*.array_record')))
    if not paths:
      raise DataError(f'{self.where}.path: there is no file {os.path.join(folder, split)}-*.array_record. '
                      'Write it with: python -m moejax.data.pack.')
    examples = Records(paths)
    if not os.path.exists(os.path.join(folder, INFO)):
      raise DataError(f'{folder} has no {INFO}: packing was interrupted. Delete the folder and pack again.')
    with open(os.path.join(folder, INFO), encoding='utf-8') as file:
      expected = json.load(file)['examples'][split]
    if len(examples) != expected:
      raise DataError(f'{folder}: {len(examples)} examples in split {split!r}, but {INFO} says {expected}. '
                      'A shard is missing; pack or copy the data again.')
    return examples


class Records:
  """Examples in ArrayRecord files."""

  def __init__(self, paths: list[str]):
    require('array_record.python.array_record_data_source', 'array_record', 'The source array_record')
    for path in paths:
      _check(path)
    self._records = grain.sources.ArrayRecordDataSource(paths)
    self._paths = paths

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    try:
      return decode(self._records[index])
    except RuntimeError as error:
      raise DataError(f'{self._paths[0]} and its shards: record {index} cannot be read; the file is broken. '
                      f'Pack or copy it again. ({_first_line(error)})') from error


def writer(path: str):
  """A writer with `write(bytes)` and `close()`. One record a chunk, for fast random access."""
  module = require('array_record.python.array_record_module', 'array_record', 'Packing')
  return module.ArrayRecordWriter(path, 'group_size:1')


def encode(example: Example) -> bytes:
  """Arrays, numbers, strings and bytes of one example. Inverse of `decode`."""
  return msgpack.packb(example, default=_pack, use_bin_type=True)


def decode(record: bytes) -> Example:
  """The example that `encode` wrote."""
  return msgpack.unpackb(record, ext_hook=_unpack, raw=False)


_ARRAY = 1  # msgpack's code of our extension type


def _pack(value):
  array = np.asarray(value)
  if array.dtype.hasobject:
    raise DataError(f'examples hold arrays, numbers, strings and bytes, not {type(value).__name__}.')
  return msgpack.ExtType(_ARRAY, msgpack.packb([array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()]))


def _unpack(code, data):
  if code != _ARRAY:
    raise DataError(f'record with an unknown extension type {code}: not written by moejax.data.pack.')
  dtype, shape, raw = msgpack.unpackb(data)
  array = np.frombuffer(raw, dtype).reshape(shape)
  return array if shape else array[()]


def _check(path):
  module = require('array_record.python.array_record_module', 'array_record', 'The source array_record')
  try:
    module.ArrayRecordReader(path).close()
  except RuntimeError as error:
    raise DataError(f'{path}: not a whole ArrayRecord file. Pack or copy it again. ({_first_line(error)})') from error


def _first_line(error):
  return (str(error).splitlines() or ['no details'])[0][:200]
