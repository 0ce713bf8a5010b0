"""Reasons a run stops early: signals, divergence, missing data or checkpoints."""
import contextlib
import os
import signal
from typing import Any

from moejax.config import Explained


class Stopped(Explained):
  """The run stopped early, for a reason that the message explains."""
  code = 1


class Interrupted(Stopped):
  """A signal stopped the run; its state is saved."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.code = 128 + signal_number


class Diverged(Stopped):
  """Too many batches in a row were skipped, and rollbacks did not help."""


class NoData(Stopped):
  """A batch did not arrive in time; the thread that waits for it ends only with the process."""
  at_once = True


class NoCheckpoint(Stopped):
  """No checkpoint can be read, or the last one could not be written."""


class Interruption:
  """Within this context Ctrl-C and SIGTERM only set `signal`, and print `notice`; the loop stops where it can.

  A second signal ends the process at once.
  """

  def __init__(self, notice: str = 'Stopping after this step, once it is saved; a second signal stops at once.'):
    self._notice = notice
    self.signal: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      with contextlib.suppress(ValueError):  # not the main thread (a notebook's worker), which alone handles signals
        self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number, frame):
    del frame
    if self.signal is not None:
      raise KeyboardInterrupt
    self.signal = number
    with contextlib.suppress(OSError):  # the reader may be gone
      os.write(2, f'\n{self._notice}\n'.encode())
