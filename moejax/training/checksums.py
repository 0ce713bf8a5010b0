"""Checksums of the files of a folder, so that the one that is damaged can be named.

    checksums.json: {"params/d/0f3a...": [<bytes>, <CRC-32>], ...}
"""
import json
import zlib
from pathlib import Path

from moejax.training.workdir import write_atomically

_NAME = 'checksums.json'
_CHUNK = 1 << 22


class Damaged(Exception):
  """Files differ from what was written."""


def write(folder: Path) -> None:
  """Adds `checksums.json`, of all files that are in `folder`."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.name != _NAME]
  sums = {str(path.relative_to(folder)): _checksum(path) for path in files}
  write_atomically(folder / _NAME, json.dumps(sums, indent=1) + '\n')


def damaged(folder: Path) -> list[str]:
  """The files that are missing, cut off or changed, each with what is wrong with it. Reads all of them.

  Where `checksums.json` itself is missing or cannot be read, it is what is named.
  """
  try:
    sums = json.loads((folder / _NAME).read_text())
  except (OSError, ValueError):
    return [f'{_NAME} cannot be read']
  found = []
  for name, (size, checksum) in sums.items():
    path = folder / name
    if not path.is_file():
      found.append(f'{name} is missing')
    elif path.stat().st_size != size:
      found.append(f'{name} has {path.stat().st_size} bytes instead of {size}')
    elif _checksum(path)[1] != checksum:
      found.append(f'{name} has other contents than were written')
  return found


def explain(folder: Path, error: Exception) -> None:
  """Raises `Damaged` from `error`, naming the files of `folder` that are; returns where none is."""
  files = damaged(folder)
  if files:
    more = f' and {len(files) - 3} other files' if len(files) > 3 else ''
    raise Damaged(f'{"; ".join(files[:3])}{more}') from error


def _checksum(path: Path) -> tuple[int, int]:
  size = checksum = 0
  with open(path, 'rb') as file:
    while chunk := file.read(_CHUNK):
      size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
  return size, checksum
