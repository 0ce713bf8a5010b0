"""Follows a run from another process: evaluates every checkpoint once, the earliest first, up to the last step.

The run is not affected. Its folder is only read, nothing in it is locked or changed: a checkpoint that retention
deletes before it is evaluated is skipped, with a message.
"""
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from moejax.parallel import processes
from moejax.training import workdir
from moejax.training.durability import lost_process, retention, stop_reasons

_NOTHING_YET, _FINISHED, _OF_THE_FIRST = 0, -1, -2  # beside the steps of checkpoints, which are positive


def run(folder: Path, evaluate: Callable[[int], None], done: Iterable[int], every: float,
        say: Callable[[str], None]) -> None:
  """Calls `evaluate(step)` for each checkpoint of the run in `folder`, and returns after the last step's.

  All processes of the evaluation call this together; the first one looks, and decides for all.

  Args:
    folder: of the run, which need not have started.
    evaluate: raises NoCheckpoint if the checkpoint of that step cannot be read.
    done: the steps that were evaluated before.
    every: seconds between two checks of the folder while it has nothing new.
    say: receives messages for the user.

  Raises:
    NoCheckpoint: the one of the last step cannot be read.
    Interrupted: a signal stopped it.
  """
  look, tried = _Look(folder, done, every, say), set()
  notice = 'Stopping after this evaluation; a second signal stops at once.'
  with stop_reasons.Interruption(notice) as interruption, lost_process.noticed():
    while True:
      if signal := processes.largest(interruption.signal or 0):
        raise stop_reasons.Interrupted(f'Stopped following {folder}. The same command evaluates the rest.', signal)
      with processes.together('look for checkpoints'):
        found = look() if jax.process_index() == 0 else _OF_THE_FIRST
      step = processes.largest(found)
      if step == _FINISHED:
        return
      if step != _NOTHING_YET:
        try:
          evaluate(step)
          look.done.add(step)
          continue
        except stop_reasons.NoCheckpoint as error:
          if not processes.largest((folder / 'checkpoints' / str(step)).is_dir()):
            continue  # deleted while it was read: the next look reports it
          if step in tried:
            if step == _steps(folder):
              raise
            say(f'Skipped step {step}: {error}')
            look.done.add(step)
            continue
          # Where renaming is not atomic (a mounted bucket), a checkpoint has its name before it is complete.
          tried.add(step)
          say(f'The checkpoint of step {step} cannot be read yet; trying once more in {every:g} s: {error}')
      _sleep(every, interruption)


class _Look:
  """Finds what to evaluate next: the step of a checkpoint, `_NOTHING_YET` or `_FINISHED`.

  Attributes:
    done: steps that need no evaluation any more.
  """

  def __init__(self, folder, done, every, say):
    self.done, self._folder, self._every, self._tell = set(done), folder, every, say
    self._seen, self._said = set(), None

  def __call__(self) -> int:
    if not (self._folder / 'config.json').exists():
      return self._wait(f'a run to start in {self._folder}')
    there = set(retention.complete(self._folder)) - self.done
    for step in sorted(self._seen - there - self.done):
      self._tell(f'The checkpoint of step {step} was deleted before it was evaluated: skipped. A larger '
                 'config.checkpoint.keep for the run leaves more time.')
    self._seen = there
    total = _steps(self._folder)
    if there:
      return min(there)
    if total in self.done:
      return _FINISHED
    return self._wait(f'a checkpoint after step {max(self.done, default=0)} of {total} in {self._folder}')

  def _wait(self, what):
    if what != self._said:
      self._tell(f'Waiting for {what}; looking every {self._every:g} s.')
      self._said = what
    return _NOTHING_YET


def _sleep(seconds, interruption):
  until = time.monotonic() + seconds
  while interruption.signal is None and (left := until - time.monotonic()) > 0:
    time.sleep(min(left, 1.0))


def _steps(folder: Path) -> int:
  config: Any = workdir.load_config(folder)
  return config.training.steps
