"""One run at a time writes into a folder: it holds the folder's lock.

    lock: {"host": "node-3", "process": 4711, "started": "83021", "machine": "<boot> <name space of process numbers>"}

The owner touches the file every few seconds. On the same machine, a killed owner is recognised by its process;
elsewhere, by a file that is no longer touched. In a bucket the lock is an object, each write of which is conditional on
the generation last seen: of several that write at once exactly one succeeds.
"""
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax

from moejax import buckets
from moejax.config import ConfigError
from moejax.parallel import processes
from moejax.training.durability.stop_reasons import Stopped

FILE = 'lock'
_TOUCH = 5.  # seconds between touches
_SILENCE = 30.  # seconds without a touch after which an owner on another machine counts as dead

# {'host': ..., 'process': ..., 'started': ..., 'machine': ...}
Owner = dict[str, Any]


class LockLost(Stopped):
  """Another run has taken over the folder in a bucket."""


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
  """Within this context no other run writes into `folder`, which is created if missing. Of several processes the
  first holds the lock.

  Raises:
    ConfigError: another run holds it, or the folder cannot be created or written to.
  """
  error, ended = None, threading.Event()
  lock = _ObjectLock(folder / FILE) if buckets.is_address(folder) else _FileLock(folder / FILE)
  if jax.process_index() == 0:
    try:
      _take(lock, folder, say)
    except ConfigError as caught:
      error = caught
  processes.wait('the first process has tried to take the folder')
  if processes.largest(error is not None):
    raise error or ConfigError(f'The first process could not lock {folder}; its error says why.')
  if jax.process_index() != 0:
    yield
    return
  touching = threading.Thread(target=lock.touch, args=(ended,), daemon=True)
  touching.start()
  try:
    yield
  finally:
    ended.set()
    touching.join()
    lock.give_back()


def check(folder: Path) -> None:
  """Raises `LockLost` in the first process if the lock of a folder in a bucket has another owner.

  Where the machine was cut off from the bucket for longer than others wait, one of them may hold it by now.
  """
  if jax.process_index() != 0 or not buckets.is_address(folder):
    return
  owner = _parsed(buckets.read(folder / FILE)[0])
  if owner != _me():
    other = f'process {owner["process"]} on {owner["host"]} has taken it over' if owner else 'its lock is gone'
    raise LockLost(f'{folder} does not belong to this run any more: {other}. Stopped, without writing to it.')


def _take(lock, folder, say):
  watched, since = None, time.monotonic()
  while True:
    def may_take(owner, touched, watched=watched, since=since):
      return owner is None or _dead(owner) or (watched == (owner, touched) and time.monotonic() - since > _SILENCE)
    try:
      held_by = lock.take_if(may_take)
    except OSError as error:
      reason = (error.strerror or str(error)).lower()
      raise ConfigError(f'--workdir={folder} cannot be the folder of a run: {reason}. Choose another --workdir.') from None
    if held_by is None:
      return
    owner, touched = held_by
    if owner['machine'] == _me()['machine'] or watched not in (None, (owner, touched)):
      raise ConfigError(f'--workdir={folder} is in use: process {owner["process"]} on {owner["host"]} trains there. '
                        'Choose another --workdir, or run the same command when it has ended.')
    if watched is None:
      watched, since = (owner, touched), time.monotonic()
      say(f'Process {owner["process"]} on {owner["host"]} holds the lock of {folder}: waiting {_SILENCE:.0f} s to see '
          'whether it is still running.')
    time.sleep(_SILENCE / 30)


class _FileLock:
  """The lock of a folder on a file system."""

  def __init__(self, path: Path):
    self._path = path

  def take_if(self, may_take: Callable[[Owner | None, int], bool]) -> tuple[Owner | None, int] | None:
    """Takes the lock if its owner and the time of its last touch allow that; returns both if not."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(self._path) as file:
      owner, touched = _read(file), os.fstat(file.fileno()).st_mtime_ns
      if not may_take(owner, touched):
        return owner, touched
      _write(file, _me())
    return None

  def touch(self, ended: threading.Event) -> None:
    """Touches the lock every few seconds until `ended`."""
    while not ended.wait(_TOUCH):
      with contextlib.suppress(OSError):
        os.utime(self._path)

  def give_back(self) -> None:
    # Where the folder was deleted in the meantime, there is nothing to give back.
    with contextlib.suppress(OSError):
      if self._path.exists():
        with _opened(self._path) as file:
          if _read(file) == _me():
            self._path.unlink()


class _ObjectLock:
  """The lock of a folder in a bucket: its generation takes the place of the time of its last touch."""

  def __init__(self, path: Path):
    self._path, self._generation = path, 0
    self._content = json.dumps(_me() | {'hold': uuid.uuid4().hex}).encode()

  def take_if(self, may_take: Callable[[Owner | None, int], bool]) -> tuple[Owner | None, int] | None:
    while True:
      content, self._generation = buckets.read(self._path)
      owner = _parsed(content)
      if not may_take(owner, self._generation):
        return owner, self._generation
      with contextlib.suppress(buckets.Changed):
        self._write()
        return None

  def touch(self, ended: threading.Event) -> None:
    with contextlib.suppress(buckets.Changed):  # `check` will say so
      while not ended.wait(_TOUCH):
        with contextlib.suppress(OSError):
          self._write()

  def give_back(self) -> None:
    with contextlib.suppress(OSError, buckets.Changed):
      buckets.delete(self._path, self._generation)

  def _write(self):
    try:
      self._generation = buckets.write(self._path, self._content, self._generation)
    except buckets.Changed:
      found, generation = buckets.read(self._path)
      if found != self._content:
        raise
      self._generation = generation  # of an earlier write whose answer was lost


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
  """The file, created if missing, under an exclusive lock among the processes of this machine."""
  while True:
    with open(path, 'a+') as file:
      # Not every network file system can lock; then two that start at the same moment collide.
      with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
      # Another may have removed it while this one waited.
      if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
        yield file
        return


def _read(file):
  file.seek(0)
  return _parsed(file.read())


def _parsed(content: str | bytes) -> Owner | None:
  """The owner; None if there is none, or if it was killed while writing."""
  try:
    owner = json.loads(content)
  except ValueError:
    return None
  if not isinstance(owner, dict) or not _me().keys() <= owner.keys():
    return None
  return {key: owner[key] for key in _me()}


def _write(file, owner):
  file.truncate(0)
  file.write(json.dumps(owner))
  file.flush()
  os.fsync(file.fileno())


def _me():
  return dict(host=socket.gethostname(), process=os.getpid(), started=_started(os.getpid()), machine=_machine())


def _dead(owner):
  return owner['machine'] == _machine() and owner['started'] != _started(owner['process'])


def _machine():
  # A host name is not enough: containers of one machine share it or not, and it outlives a boot.
  try:
    return f'{Path("/proc/sys/kernel/random/boot_id").read_text().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _started(process: int) -> str | None:
  """When a process of this machine started; None if it is not running."""
  if os.path.exists('/proc/self/stat'):
    try:
      # The name of the program, in brackets, may hold anything.
      state, *numbers = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    except OSError:
      return None
    started = numbers[18]
  else:
    said = subprocess.run(['ps', '-o', 'stat=,lstart=', '-p', str(process)], capture_output=True, text=True).stdout
    state, _, started = said.strip().partition(' ')
  return None if state[:1] in ('', 'Z', 'X') else started  # a zombie is not running either
