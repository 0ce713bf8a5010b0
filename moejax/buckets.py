"""Files in Google Cloud Storage, named by gs:// addresses.

`path` makes a path of an address that reads, writes and lists like a `pathlib.Path`, and that orbax takes. What such a
path cannot do is done here by Google's client: writes that fail if the object has changed, moves, and sizes and
checksums of many objects without reading them. Both need the extra [gcs].
"""
import contextlib
import functools
import importlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.config import ConfigError

_SECONDS = 10  # for a small request, and again for repeating it; those for files have the client's minutes


class Changed(Exception):
  """An object is not the one that the caller has seen."""


def is_address(name: str | os.PathLike) -> bool:
  """Whether `name` is in a bucket: 'gs://bucket/run', or a path of it."""
  return re.match('gs:/', os.fspath(name)) is not None


def path(name: str | os.PathLike) -> Path:
  """A path of this machine, or of a bucket for a gs:// address. Raises ConfigError if the extra [gcs] is missing."""
  if not is_address(name):
    return Path(name)
  _set_up()
  from etils import epath
  found: Any = epath.Path(re.sub('^gs:/+', 'gs://', os.fspath(name)))  # pathlib makes one slash of two
  return found


def reach(folder: Path) -> None:
  """Makes one request for the bucket of `folder`.

  Raises:
    ConfigError: there are no credentials, no such bucket, no permission, or no answer.
  """
  errors = _google('api_core.exceptions')
  bucket, key = split(folder)
  if not bucket or not key:
    raise ConfigError('it names no folder in a bucket: write gs://bucket/folder.')
  try:
    _client().get_bucket(bucket, **_soon())
  except _google('auth.exceptions').DefaultCredentialsError:
    raise ConfigError('there are no credentials for Google Cloud. Run gcloud auth application-default login, '
                      'or use a machine with a service account.') from None
  except errors.NotFound:
    raise ConfigError(f'there is no bucket {bucket}.') from None
  except errors.Forbidden:
    raise ConfigError(f'these credentials may not see the bucket {bucket}. Grant them roles/storage.objectUser '
                      'and roles/storage.legacyBucketReader on it.') from None
  except Exception as error:  # whatever the network and the libraries of Google raise
    raise ConfigError(f'the bucket {bucket} cannot be reached ({_first_line(error)}).') from error


# ---- objects --------------------------------------------------------------------------------------------------------


def objects(folder: Path) -> dict[str, Any]:
  """All objects below `folder` by their path in it: `google.cloud.storage.Blob`s with size, md5_hash and updated."""
  bucket, key = split(folder)
  return {name[len(key) + 1:]: blob for name, blob in beginning_with(bucket, f'{key}/').items()}


def beginning_with(bucket: str, prefix: str) -> dict[str, Any]:
  """All objects of a bucket whose names begin with `prefix`, by name."""
  with _os_errors():
    return {blob.name: blob for blob in _client().list_blobs(bucket, prefix=prefix) if not blob.name.endswith('/')}


def read(file: Path) -> tuple[bytes, int]:
  """(content, generation) of an object; (b'', 0) if there is none."""
  errors, blob = _google('api_core.exceptions'), _blob(file)
  with _os_errors():
    while True:
      try:
        blob.reload(**_soon())
      except errors.NotFound:
        return b'', 0
      generation = int(blob.generation)
      with contextlib.suppress(errors.NotFound, errors.PreconditionFailed):  # another write came between
        return blob.download_as_bytes(if_generation_match=generation, **_soon()), generation


def write(file: Path, content: bytes, generation: int) -> int:
  """Writes an object whose generation is `generation` (0: that does not exist), and returns its new one.

  Raises:
    Changed: it has another generation. A request that was repeated after its answer was lost may raise it, too.
  """
  blob = _blob(file)
  with _os_errors():
    blob.upload_from_string(content, if_generation_match=generation, **_soon())
    return int(blob.generation)


def delete(file: Path, generation: int) -> None:
  """Deletes the object if `generation` is its generation. Raises Changed if not."""
  with _os_errors():
    _blob(file).delete(if_generation_match=generation, **_soon())


def append(file: Path, line: bytes) -> None:
  """Appends a line to an object; no line of others is lost, however many append at once."""
  while True:
    before, generation = read(file)
    whole = before + (b'\n' if before and not before.endswith(b'\n') else b'') + line
    try:
      write(file, whole, generation)
      return
    except Changed:
      if read(file)[0] == whole:  # by this call: its answer was lost
        return


def upload(local: Path, file: Path) -> None:
  """Replaces an object by a local file; its content type follows from the name."""
  with _os_errors():
    _blob(file).upload_from_filename(str(local))


def download(blob: Any, local: Path) -> None:
  """Copies an object to a file, which appears once it is whole, has the right checksum, and the object's time."""
  local.parent.mkdir(parents=True, exist_ok=True)
  partial = local.with_name(f'{local.name}.partial')
  with _os_errors():
    blob.download_to_filename(str(partial))
  os.utime(partial, ns=(changed := time_of(blob), changed))
  os.replace(partial, local)


def move(source: Path, target: Path, marker: str = '') -> None:
  """Moves a folder of this machine, or of a bucket: there, its objects do not pass through this machine.

  Args:
    marker: name of the object that says that all others are there. It is copied first and deleted last, so that a
      folder that was moved halfway is never taken for one that was written halfway.
  """
  if not is_address(source):
    source.rename(target)
    return
  key, found = split(target)[1], objects(source)
  names = sorted(found, key=lambda name: name != marker)
  with _os_errors():
    for name in names:
      found[name].bucket.copy_blob(found[name], found[name].bucket, f'{key}/{name}')
    for name in reversed(names):
      found[name].delete()


def time_of(blob: Any) -> int:
  """When the object was written, in nanoseconds as file systems have them."""
  return int(blob.updated.timestamp() * 1e6) * 1000


# ---- the client -----------------------------------------------------------------------------------------------------


@functools.cache
def _set_up() -> None:
  """Chooses the libraries, of the several that orbax's paths would use, before their first use."""
  try:
    importlib.import_module('gcsfs')
    _google('cloud.storage')
  except ImportError as error:
    raise ConfigError(f"gs:// addresses need a package that is not installed ({error}): "
                      "pip install 'moejax[gcs]'.") from None
  import fsspec.config
  os.environ['EPATH_USE_TF'] = 'false'  # whether or not tensorflow is installed
  # Several machines write: what one has listed before says nothing about now.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs what it raises


@functools.cache
def _client() -> Any:
  _set_up()
  return _google('cloud.storage').Client()


def split(file: Path) -> tuple[str, str]:
  """('bucket', 'a/b') of gs://bucket/a/b."""
  bucket, _, key = str(file).removeprefix('gs://').partition('/')
  return bucket, key


def _blob(file: Path) -> Any:
  bucket, key = split(file)
  return _client().bucket(bucket).blob(key)


def _soon() -> dict[str, Any]:
  return dict(timeout=_SECONDS, retry=_google('cloud.storage.retry').DEFAULT_RETRY.with_timeout(_SECONDS))


def _google(module: str) -> Any:
  return importlib.import_module(f'google.{module}')  # of the extra, which type checkers need not have


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
  """Errors of Google's libraries as the OSError that a file system would raise."""
  errors = _google('api_core.exceptions')
  try:
    yield
  except errors.PreconditionFailed as error:
    raise Changed(_first_line(error)) from error
  except (errors.GoogleAPIError, _google('auth.exceptions').GoogleAuthError,
          _google('cloud.storage.exceptions').DataCorruption) as error:
    raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.splitlines()[0][:200]
