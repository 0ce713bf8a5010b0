"""One run at a time writes into a folder: it holds the folder's lock.

    lock: {"host": "node-3", "process": 4711, "started": "83021", "machine": "<boot> <name space of process numbers>"}

The owner touches the file every few seconds. An owner that was killed is known by its process on the same machine, and
elsewhere by a file that nobody touches any more.
"""
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import jax

from moejax.config import ConfigError
from moejax.parallel import processes

FILE = 'lock'
_TOUCH = 5.  # seconds between touches
_SILENCE = 30.  # seconds without one after which an owner on another machine counts as dead


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
  """Within this context no other run writes into `folder`, which is made if missing. Of several processes the first
  holds it.

  Raises:
    ConfigError: another run holds it, or it cannot be made or written to.
  """
  error, ended = None, threading.Event()
  if jax.process_index() == 0:
    try:
      _take(folder, say)
    except ConfigError as caught:
      error = caught
  processes.wait('the first process has tried to take the folder')
  if processes.largest(error is not None):
    raise error or ConfigError(f'The first process could not take {folder}, and says why.')
  if jax.process_index() != 0:
    yield
    return
  threading.Thread(target=_touch, args=(folder / FILE, ended), daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    _give_back(folder / FILE)


def _take(folder, say):
  watched, since = None, time.monotonic()
  while True:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with _opened(folder / FILE) as file:
        owner, touched = _read(file), os.fstat(file.fileno()).st_mtime_ns
        if owner is None or _dead(owner) or (watched == (owner, touched) and time.monotonic() - since > _SILENCE):
          _write(file, _me())
          return
    except OSError as error:
      reason = (error.strerror or str(error)).lower()
      raise ConfigError(f'--workdir={folder} cannot be the folder of a run: {reason}. Choose another --workdir.') from None
    if owner['machine'] == _me()['machine'] or watched not in (None, (owner, touched)):
      raise ConfigError(f'--workdir={folder} is in use: process {owner["process"]} on {owner["host"]} trains there. '
                        'Choose another --workdir, or run the same command when it has ended.')
    if watched is None:
      watched, since = (owner, touched), time.monotonic()
      say(f'Process {owner["process"]} on {owner["host"]} has not given back {folder}: waiting {_SILENCE:.0f} s to see '
          'whether it still runs.')
    time.sleep(_SILENCE / 30)


def _give_back(path):
  # Where the folder was deleted in the meantime, there is nothing to give back.
  with contextlib.suppress(OSError):
    if path.exists():
      with _opened(path) as file:
        if _read(file) == _me():
          path.unlink()


def _touch(path, ended):
  while not ended.wait(_TOUCH):
    with contextlib.suppress(OSError):
      os.utime(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
  """The file, made if missing, which no other process of this machine opens like this at the same time."""
  while True:
    with open(path, 'a+') as file:
      with contextlib.suppress(OSError):  # Not every network file system can; then two have to start within a moment.
        fcntl.flock(file, fcntl.LOCK_EX)
      # Another may have removed it while this one waited.
      if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
        yield file
        return


def _read(file):
  """The owner; None where there is none, or where it was killed while it wrote."""
  file.seek(0)
  try:
    owner = json.load(file)
  except ValueError:
    return None
  return owner if isinstance(owner, dict) and owner.keys() == _me().keys() else None


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
  """When a process of this machine started; None where it does not run."""
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
  return None if state[:1] in ('', 'Z', 'X') else started  # one that has ended, and that nobody has waited for
