"""Checksums of the files of a folder: small files are verified before they are used, and damaged files are named.

    checksums.json: {"files": {"params/d/0f3a...": [<bytes>, <CRC-32>], ...}, "checksum": <CRC-32 of files>}

In a bucket, MD5 takes the place of CRC-32: the bucket computes it for every object, so that no process reads a
checkpoint only to check it. A copy on a disk of such a folder is verified by it, too.
"""
import base64
import hashlib
import json
import zlib
from pathlib import Path

from moejax import buckets
from moejax.training.workdir import write_atomically

_NAME = 'checksums.json'
# orbax rewrites this file when a checkpoint gets its name; nothing in it is restored.
_CHANGES_LATER = '_CHECKPOINT_METADATA'
_CHUNK = 1 << 22


class Damaged(Exception):
  """Files differ from what was written."""


def write(folder: Path) -> None:
  """Writes `checksums.json` for all files in `folder`."""
  in_bucket = buckets.is_address(folder)
  sums = {name: (size, _checksum(folder / name, in_bucket, md5)) for name, (size, md5) in _files(folder).items()
          if name.rpartition('/')[2] not in (_NAME, _CHANGES_LATER)}
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
  except (OSError, ValueError, KeyError, TypeError) as error:
    if buckets.is_address(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
      raise  # says something about the network
    return [f'{_NAME} cannot be read']
  found, files = [], _files(folder)
  for name, (size, checksum) in sums.items():
    if not name.startswith(within):
      continue
    if name not in files:
      found.append(f'{name} is missing')
    elif files[name][0] != size:
      found.append(f'{name} has {files[name][0]} bytes instead of {size}')
    elif _checksum(folder / name, isinstance(checksum, str), files[name][1]) != checksum:
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


def _files(folder: Path) -> dict[str, tuple[int, str | None]]:
  """{path in the folder: (size, MD5 where the bucket knows it)} of all files, in order."""
  if buckets.is_address(folder):
    return {name: (blob.size, blob.md5_hash) for name, blob in sorted(buckets.objects(folder).items())}
  return {path.relative_to(folder).as_posix(): (path.stat().st_size, None) for path in sorted(folder.rglob('*'))
          if path.is_file()}


def _checksum(path: Path, as_md5: bool, known: str | None) -> int | str:
  if as_md5 and known is not None:
    return known
  md5, crc32 = hashlib.md5(usedforsecurity=False), 0
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      if as_md5:
        md5.update(chunk)
      else:
        crc32 = zlib.crc32(chunk, crc32)
  return base64.b64encode(md5.digest()).decode() if as_md5 else crc32
