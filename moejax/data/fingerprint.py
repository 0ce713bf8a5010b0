"""Fingerprints of data, to detect that they changed between the start of a run and its resumption.

Cheap for any amount of data, and equal for copies: file times are ignored. Large files are only sampled, so a change
between the samples goes unnoticed.
"""
import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_EXAMPLES, _FILES, _BLOCKS, _BLOCK = 8, 64, 4, 1 << 14


def of_examples(examples: Any) -> dict[str, str]:
  """The number of examples, and a checksum of a few, the first and the last included."""
  checksum = 0
  for index in _spread(len(examples), _EXAMPLES):
    checksum = _add(examples[index], checksum)
  return {'examples': str(len(examples)), 'checksum of some examples': f'{checksum:08x}'}


def of_files(paths: Sequence[str]) -> dict[str, str]:
  """The number and total size of the files, and for some the size and a checksum of blocks (of all of a small file)."""
  sizes = [os.path.getsize(path) for path in paths]
  folder: str = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
  found = {'files': str(len(paths)), 'bytes': str(sum(sizes))}
  for index in _spread(len(paths), _FILES):
    path, size = paths[index], sizes[index]
    found[os.path.relpath(path, folder)] = f'{size} bytes of checksum {_blocks(path, size):08x}'
  return found


def _blocks(path, size):
  checksum = 0
  with open(path, 'rb') as file:
    for start in _spread(max(size - _BLOCK, 0) + 1, _BLOCKS) if size > _BLOCKS * _BLOCK else range(0, size, _BLOCK):
      file.seek(start)
      checksum = zlib.crc32(file.read(_BLOCK), checksum)
  return checksum


def _spread(total: int, count: int) -> list[int]:
  """At most `count` evenly spaced ints below `total`."""
  return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64)).tolist()


def _add(value, checksum):
  if isinstance(value, dict):
    for name in sorted(value):
      checksum = _add(value[name], _add(name, checksum))
  elif isinstance(value, (list, tuple)):
    for item in value:
      checksum = _add(item, checksum)
  elif isinstance(value, (bytes, str)):
    checksum = zlib.crc32(value.encode('utf-8', 'surrogatepass') if isinstance(value, str) else value, checksum)
  elif isinstance(value, (bool, int, float, np.generic, np.ndarray)):
    array = np.ascontiguousarray(value)
    if not array.dtype.hasobject:
      checksum = zlib.crc32(array.view(np.uint8).data, zlib.crc32(f'{array.dtype.str}{np.shape(value)}'.encode(), checksum))
  # Other objects (None, undecoded pictures) contribute nothing.
  return checksum
