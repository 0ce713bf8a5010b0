"""Data in a bucket, copied to this machine before they are read: readers need files.

    ~/.cache/moejax/gs/<bucket>/<name of the object>        XDG_CACHE_HOME applies
"""
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moejax import buckets


def local_copy(address: str) -> str:
  """Copies the object, folder or pattern with `*` that `address` names to this machine, and returns its path there.

  Each copy is verified. Objects that have not changed since are not copied again; processes of one machine share them.

  Raises:
    ConfigError: the bucket cannot be reached.
    OSError: there is no such object, the disk is too small, or copying failed.
  """
  buckets.reach(buckets.path(address))
  bucket, key = buckets.split(buckets.path(address))
  cache = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'moejax', 'gs', bucket)
  belongs = _pattern(key)
  found = {name: blob for name, blob in buckets.beginning_with(bucket, key.split('*')[0]).items() if belongs(name)}
  if not found:
    raise FileNotFoundError(f'there is no object {address}. Check the address; `*` stands for any part of a name')
  cache.mkdir(parents=True, exist_ok=True)
  with open(cache / '.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for local in cache.rglob('*'):
      name = str(local.relative_to(cache))
      if local.is_file() and belongs(name) and name not in found:
        local.unlink()  # its object is gone: it must not count as data
    _copy([blob for name, blob in found.items() if not _is_copy(cache / name, blob)], cache, address)
  return str(cache / key)


def _copy(blobs: list[Any], cache: Path, address: str) -> None:
  size, free = sum(blob.size for blob in blobs), shutil.disk_usage(cache).free
  if size > free:
    raise OSError(f'{address} has {size / 1e9:.1f} GB to copy, and {cache} {free / 1e9:.1f} GB of space. Set '
                  'XDG_CACHE_HOME to a folder on a larger disk, or mount the bucket (gcsfuse)')
  if blobs:
    print(f'Copying {address} to {cache}: {len(blobs)} objects, {size / 1e9:.3g} GB.', flush=True)
  for blob in tqdm(blobs, unit='object', disable=None, leave=False):
    buckets.download(blob, cache / blob.name)


def _is_copy(local: Path, blob: Any) -> bool:
  return local.is_file() and (local.stat().st_size, local.stat().st_mtime_ns) == (blob.size, buckets.time_of(blob))


def _pattern(key: str) -> Any:
  # What `source.expand` finds among files: `**` spans any number of folders.
  expression = ''.join({'**/': '(?:.*/)?', '/**': '/.*', '*': '[^/]*'}.get(part, re.escape(part))
                       for part in re.split(r'(\*\*/|/\*\*$|\*)', key))
  return re.compile(expression if '*' in key else expression + '(?:/.*)?').fullmatch
