"""Files of examples: where they lie, which of them a pattern names, and sources that are made of them."""
import abc
import functools
import glob
import gzip
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from moejax import buckets
from moejax.annotations import shown
from moejax.config import ConfigError
from moejax.data import bucket_copies, fingerprint
from moejax.data.source import DataError, Examples, Source, Subset, decoding, holdout
from moejax.ranges import NotEmpty

Path = Annotated[str, NotEmpty()]


class Files(Source):
  """Files of examples.

  Subclasses are dataclasses with the fields `where`, `files`, `test_fraction` and `split_seed`, and implement `read`.

  Config keys:
    files: a file, a folder, or a pattern in which `*` stands for any part of a name (`**/` for any folders), whose
      examples are split here; or `dict(train=..., test=...)`, one per split.
  """
  files: Path | Annotated[Mapping, NotEmpty()]
  test_fraction: float
  split_seed: int

  def __post_init__(self):
    if not isinstance(self.files, str):
      check_strings(self.files, '.files')

  @property
  def splits(self) -> tuple[str, ...]:
    return ('train', 'test') if isinstance(self.files, str) else tuple(self.files)

  @abc.abstractmethod
  def read(self, paths: list[str]) -> Examples:
    """The examples of these files, in order."""

  def open(self, split: str) -> Examples:
    self.check_split(split)
    if isinstance(self.files, str):
      count, key = len(self._everything), f'{self.where}.test_fraction'
      indices = holdout(count, float(self.test_fraction), self.split_seed, key,
                        f', or name files for each split: {self.where}.files is {self.files!r}, and may be '
                        'dict(train=..., test=...)')
      return Subset(self._everything, indices[split])
    return self.read(expand(self.files[split], f'{self.where}.files.{split}'))

  def fingerprint(self, split: str, examples: Any) -> dict[str, str]:
    pattern = self.files if isinstance(self.files, str) else self.files[split]
    return {'examples': str(len(examples)), **fingerprint.of_files(expand(pattern, f'{self.where}.files'))}

  @functools.cached_property
  def _everything(self) -> Examples:
    return self.read(expand(str(self.files), f'{self.where}.files'))


def check_strings(config: Mapping, where: str) -> None:
  """Raises ConfigError if a value of `config` is not a non-empty string."""
  for key, value in config.items():
    if not isinstance(value, str) or not value:
      raise ConfigError(f'{where}.{key} must be a non-empty string, not {shown(value)}.')


def local_path(path: str, where: str) -> str:
  """`path` on this machine: `~` is the home folder, and what is at gs:// is copied to this machine.

  Raises:
    DataError: it is another URL, or cannot be copied.
  """
  if not is_url(path):
    return os.path.expanduser(path)
  if not buckets.is_address(path):
    raise DataError(f'{where}: {path} is a URL, but only local files and gs:// can be read. Copy the data to a disk '
                    "(aws s3 sync), mount the bucket (s3fs), or use the source 'huggingface' or 'tfds'.")
  try:
    return bucket_copies.local_copy(path)
  except (ConfigError, OSError) as error:
    raise DataError(f'{where}: {path} cannot be copied to this machine: {str(error).rstrip(".")}.') from error


def is_url(path: str) -> bool:
  """Whether `path` is an address of the web or of a bucket."""
  return re.match(r'[A-Za-z][\w+.-]*://', path) is not None


def expand(pattern: str, where: str) -> list[str]:
  """The files that a path, a folder or a pattern with `*` names, sorted. Raises DataError if there are none."""
  path = local_path(pattern, where)
  if os.path.isdir(path):
    matching = os.path.join(glob.escape(path), '*')
  elif os.path.isfile(path):
    matching = glob.escape(path)
  else:
    matching = '*'.join(map(glob.escape, path.split('*')))  # names may hold brackets
  paths = sorted(found for found in glob.glob(matching, recursive=True) if os.path.isfile(found))
  if not paths:
    raise DataError(f'{where}: there is no file {path!r}. Check the path; `*` stands for any part of a name.')
  return paths


def read_file(path: str) -> bytes:
  """The contents of a file, decompressed if its name ends in `.gz`. Raises DataError if it cannot be read."""
  zipped = path.endswith('.gz')
  with decoding(path, *(('corrupt gzip file', 'Download it again.') if zipped else ())):
    with (gzip.open if zipped else open)(path, 'rb') as file:
      return file.read()
