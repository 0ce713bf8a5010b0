"""Checksums of the files of a folder: small files are verified before they are used, and damaged files are named.

    checksums.json: {"files": {"params/d/0f3a...": [<bytes>, <CRC-32>], ...}, "checksum": <CRC-32 of files>}
"""
import json
import zlib
from pathlib import Path

from moejax.training.workdir import write_atomically

_NAME = 'checksums.json'
# orbax rewrites this file when a checkpoint gets its name; nothing in it is restored.
_CHANGES_LATER = '_CHECKPOINT_METADATA'
_CHUNK = 1 << 22


class Damaged(Exception):
  """Files differ from what was written."""


def write(folder: Path) -> None:
  """Writes `checksums.json` for all files in `folder`."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.name not in (_NAME, _CHANGES_LATER)]
  sums = {str(path.relative_to(folder)): _checksum(path) for path in files}
  write_atomically(folder / _NAME, json.dumps({'files': sums, 'checksum': _of(sums)}, indent=1) + '\n')


def damaged(folder: Path, within: str = '') -> list[str]:
  """The missing, truncated or changed files whose path begins with `within`, each with its problem.

  Only `checksums.json` where that itself is missing or damaged.
  """
  try:
    content = json.loads((folder / _NAME).read_text())
    sums = content['files']
    if content['checksum'] != _of(sums):
      return [f'{_NAME} differs from what was written']
  except (OSError, ValueError, KeyError, TypeError):
    return [f'{_NAME} cannot be read']
  found = []
  for name, (size, checksum) in sums.items():
    path = folder / name
    if not name.startswith(within):
      continue
    if not path.is_file():
      found.append(f'{name} is missing')
    elif path.stat().st_size != size:
      found.append(f'{name} has {path.stat().st_size} bytes instead of {size}')
    elif _checksum(path)[1] != checksum:
      found.append(f'{name} differs from what was written')
  return found


def check(folder: Path, within: str = '') -> None:
  """Raises `Damaged`, with their names, if files of `folder` whose path begins with `within` are damaged."""
  files = damaged(folder, within)
  if files:
    more = f' and {len(files) - 3} other files' if len(files) > 3 else ''
    raise Damaged(f'{"; ".join(files[:3])}{more}')


def _of(sums):
  return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def _checksum(path: Path) -> tuple[int, int]:
  size = checksum = 0
  with open(path, 'rb') as file:
    while chunk := file.read(_CHUNK):
      size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
  return size, checksum
