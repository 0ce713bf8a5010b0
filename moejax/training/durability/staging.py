"""Staging of runs in a bucket: the files that a run appends to grow on this machine, and are uploaded whole.

    gs://bucket/run/metrics.jsonl  metrics.csv  tensorboard/  wandb/  profile/  report/    copies of the staged files
    gs://bucket/run/config.json  lineage.json  evaluations.jsonl  lock  checkpoints/       written there directly

A run uploads what has changed before each checkpoint and at its end, so that it resumes with all rows up to the
checkpoint. Nothing of this happens to a run in a folder: it is its own staging folder.
"""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from moejax import buckets
from moejax.parallel import processes
from moejax.training.durability import lock, lost_process
from moejax.training.loggers import JsonLines

# What a run does not continue, or does not stage.
_STAYS = ('checkpoints', 'report', 'profile', 'config.json', 'lineage.json', 'evaluations.jsonl', lock.FILE)


class StagingFolder:
  """Where a run writes the files that grow.

  The first process writes all of them, the others only their profiles.

  Args:
    workdir: of the run.
    say: receives messages for the user.

  Attributes:
    folder: on this machine; `workdir` itself if that is not an address.
  """

  def __init__(self, workdir: Path, say: Callable[[str], None]):
    self._workdir, self._say = workdir, say
    self._in_bucket, self.folder = buckets.is_address(workdir), workdir
    self._uploaded: dict[Path, tuple[int, int]] = {}

  def __enter__(self):
    if self._in_bucket:
      self.folder = Path(tempfile.mkdtemp(prefix='moejax-')) / self._workdir.name
      self.folder.mkdir()
      with processes.together('read its files'):
        for name, blob in buckets.objects(self._workdir).items():
          if name.split('/')[0] not in _STAYS and (jax.process_index() == 0 or name == JsonLines.FILE):
            buckets.download(blob, self.folder / name)
      self._uploaded = dict(self._files())
    return self

  def __exit__(self, kind, error, traceback):
    if not self._in_bucket:
      return
    try:
      lock.check(self._workdir)
      self._upload()
    except (OSError, lock.LockLost) as reason:
      if kind is None or not issubclass(kind, lock.LockLost):
        self._say(f'The last files of {self._workdir} could not be uploaded ({_first_line(reason)}). They are in '
                  f'{self.folder} on this machine.')
    else:
      shutil.rmtree(self.folder.parent, ignore_errors=True)

  def upload(self, step: int) -> bool:
    """Uploads what has changed, before the checkpoint of `step`; whether that succeeded in all processes.

    Raises:
      lock.LockLost: another run has taken over the folder.
    """
    if not self._in_bucket:
      return True
    try:
      with processes.together('upload its files'):
        lock.check(self._workdir)
        self._upload()
    except (OSError, RuntimeError) as error:
      lost_process.check(error)
      self._say(f'The checkpoint of step {step} is not written, because {JsonLines.FILE} and other files could not '
                f'be uploaded to {self._workdir} ({_first_line(error)}). Training continues; the next checkpoint is '
                'written as scheduled.')
      return False
    return True

  def say(self, text: str) -> None:
    """Says `text` with the address of the run in place of the staging folder."""
    self._say(text.replace(str(self.folder), str(self._workdir)))

  def _upload(self):
    for path, state in self._files():
      if self._uploaded.get(path) != state:
        buckets.upload(path, self._workdir / path.relative_to(self.folder).as_posix())
        self._uploaded[path] = state

  def _files(self):
    """(path, its size and time) of every file that this process uploads."""
    for folder, _, names in os.walk(self.folder if jax.process_index() == 0 else self.folder / 'profile'):
      for path in (Path(folder, name) for name in sorted(names)):
        unfinished = any(part.endswith('.partial') for part in path.relative_to(self.folder).parts)
        with contextlib.suppress(FileNotFoundError):
          if not unfinished and not path.is_symlink():
            yield path, (path.stat().st_size, path.stat().st_mtime_ns)


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
