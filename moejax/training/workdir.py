"""The folder of a run: its files, and which run it belongs to.

    config.json  metrics.jsonl  tensorboard/  checkpoints/<step>/  report/index.html  lock (while it runs)
    lineage.json        if config.init names other runs
    metrics.csv  wandb/  profile/   if config.loggers and config.profile ask for them
"""
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from moejax import buckets
from moejax.config import ConfigError
from moejax.parallel import processes
from moejax.training.durability import resume, retention

_ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:/')  # s3://bucket, and what pathlib makes of it


def find(workdir: str | Path) -> Path:
  """The folder of a run that the user names: `~` is expanded, and gs://bucket/run is a folder in a bucket.

  Raises:
    ConfigError: it is not a folder, checkpoints in it could not be read back, or the bucket cannot be reached.
  """
  name = os.path.expanduser(workdir)
  if buckets.is_address(name):
    return _find_in_bucket(name)
  if _ADDRESS.match(name):
    raise ConfigError(f'--workdir={workdir} is an address, and a run needs a folder, or gs://bucket/folder. Mount the '
                      'bucket (s3fs, ...), and set --workdir to a folder in it.')
  if name.startswith('~'):
    raise ConfigError(f'--workdir={workdir}: there is no home folder {name.split("/")[0]}. Write out the path, or '
                      'begin it with ./ for a folder of that name.')
  path = Path(name)
  # orbax globs for files below this path, so these characters would act as wildcards.
  if forbidden := sorted(set('*?[\\') & set(str(path.absolute()))):
    raise ConfigError(f'--workdir={workdir}: checkpoints in {path.absolute()} could not be read back, because of the '
                      f'{" and ".join(forbidden)} in its path. Choose a --workdir without them.')
  if problem := _problem(path):
    raise ConfigError(f'--workdir={workdir} cannot be the folder of a run: {problem}. Choose another --workdir.')
  return path


def _find_in_bucket(name: str) -> Path:
  try:
    path = buckets.path(name)
    if forbidden := sorted(set('*?[\\#') & set(str(path))):
      raise ConfigError(f'there is {" and ".join(forbidden)} in its name. Choose one without.')
    buckets.reach(path)
  except ConfigError as error:
    raise ConfigError(f'--workdir={name} cannot be the folder of a run: {error}') from None
  return path


def claim(workdir: str | Path, config: ConfigDict) -> list[str]:
  """Makes `workdir` the folder of this run, or checks that it already is.

  Returns:
    One sentence for each change since the run was last started; config.json has the new values.

  Raises:
    ConfigError: the folder holds a run whose config differs in keys that may not change (`durability.resume`); names
      them with both values. Or the processes do not share the folder.
  """
  folder = buckets.path(workdir)
  path, changes = folder / 'config.json', []
  if path.exists():
    old = resume.completed(load_config(workdir))
    differences = dict(compare(old, config))
    if forbidden := [differences[key] for key in resume.refused(list(differences))]:
      shown = '; '.join(forbidden[:8]) + (f'; and {len(forbidden) - 8} more' if len(forbidden) > 8 else '')
      raise ConfigError(f'{workdir} holds a run with another config: {shown}. Choose another --workdir, or set these '
                        f'keys back. (These may change on resume: {", ".join(resume.FREE)}, training.steps.)')
    changes = [f'Resuming with another config: {line}.' for line in differences.values()]
    changes += resume.follow_length(old.to_dict(), config.to_dict(), retention.complete(workdir), folder)
  elif (folder / 'checkpoints').exists() or (folder / 'metrics.jsonl').exists():
    raise ConfigError(f'{workdir} holds checkpoints or metrics but no config.json, so the run they belong to is '
                      'unknown. Choose another --workdir.')
  processes.wait('all have looked into the folder')
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dumps(config))
  processes.wait('the folder is claimed')
  if not path.exists():
    raise ConfigError(f'The first process wrote {path}, and this one does not see it. Choose a --workdir on a file '
                      'system that all machines of the run share.')
  return changes


def compare(old: ConfigDict, new: ConfigDict) -> list[tuple[str, str]]:
  """(key, 'key was ..., now ...') of every key in which the configs differ."""
  before, after = _flat(old), _flat(new)
  def spell(values, key):
    return repr(values[key]) if key in values else 'absent'
  return [(key, f'{key} was {spell(before, key)}, now {spell(after, key)}')
          for key in sorted(set(before) | set(after))
          if spell(before, key) != spell(after, key)]


def load_config(workdir: str | Path) -> ConfigDict:
  """The config of the run in `workdir`. Raises ConfigError where there is none."""
  path = buckets.path(workdir) / 'config.json'
  if not path.exists():
    raise ConfigError(f'{workdir} holds no run: there is no config.json in it.')
  try:
    return loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f'{path} cannot be read ({error}).') from None


def dumps(config: ConfigDict) -> str:
  """`config` as JSON; `loads` returns an equal one. Raises ConfigError for values that JSON cannot hold."""
  return json.dumps(_encode(config, 'config'), indent=2) + '\n'


def loads(text: str) -> ConfigDict:
  """The inverse of `dumps`; what an earlier version dumped has today's names."""
  return ConfigDict(_decode(json.loads(text)))


def write_atomically(path: Path, text: str) -> None:
  """Writes all of `text` or nothing."""
  if buckets.is_address(path):
    path.write_bytes(text.encode())  # objects are whole
    return
  partial = path.with_name(path.name + '.partial')
  try:
    with open(partial, 'w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise


def _problem(path):
  for part in (path, *path.parents):
    if os.path.islink(part) and not os.path.exists(part):
      return f'{part} is a link to {os.readlink(part)}, which does not exist'
  try:
    return None if stat.S_ISDIR(os.stat(path).st_mode) else 'it is not a folder'
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    return (getattr(error, 'strerror', None) or str(error)).lower()


# JSON has no tuples, and a tuple is not equal to a list.
_TUPLE = '__tuple__'
# {(key, value) in the configs of earlier versions: the same today}
_RENAMED = {
    ('layers', 'scan'): ('stacking', 'scan'), ('layers', 'unrolled'): ('stacking', 'unrolled'),
    ('name', 'top_2'): ('name', 'gshard_top_2'), ('name', 'top_n'): ('name', 'thresholded_top_k'),
}


def _encode(value: Any, where: str) -> Any:
  if isinstance(value, (ConfigDict, dict)):
    return {str(key): _encode(item, f'{where}.{key}') for key, item in value.items()}
  if isinstance(value, tuple):
    return {_TUPLE: [_encode(item, where) for item in value]}
  if isinstance(value, list):
    return [_encode(item, where) for item in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ConfigError(f'{where} must be an int, a float, a bool, a str, None, a list, a tuple or a dict, not '
                    f'{value!r} ({type(value).__name__}). Name the object in the config, and register it in the code.')


def _decode(value: Any) -> Any:
  if isinstance(value, dict):
    if set(value) == {_TUPLE}:
      return tuple(_decode(item) for item in value[_TUPLE])
    return dict(_RENAMED.get((key, item), (key, item)) if isinstance(item, str) else (key, _decode(item))
                for key, item in value.items())
  return [_decode(item) for item in value] if isinstance(value, list) else value


def _flat(config, prefix='') -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    nested = isinstance(value, (ConfigDict, dict)) and len(value)
    flat.update(_flat(value, f'{prefix}{key}.') if nested else {f'{prefix}{key}': _encode(value, prefix + str(key))})
  return flat
