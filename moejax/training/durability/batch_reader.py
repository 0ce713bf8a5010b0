"""Reads batches: warns when the data are slow, and stops the run, instead of hanging, when they never arrive."""
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from moejax.training.durability.recovery import RecoveryConfig
from moejax.training.durability.stop_reasons import Interruption


class NoBatch(Exception):
  """No batch could be read. `__cause__` is the exception raised by the data, or None after a timeout."""


class BatchReader:
  """The batches of a run, read on demand by a background thread.

  Args:
    iterator: over the training data.
    options: config.recovery.
    interruption: a single-process run stops waiting as soon as it is interrupted.
    say: receives messages for the user.
  """

  def __init__(self, iterator: Any, options: RecoveryConfig, interruption: Interruption, say: Callable[[str], None]):
    self._iterator, self._options, self._interruption, self.say = iterator, options, interruption, say
    self._position = None
    self._asked, self._given = queue.SimpleQueue(), queue.SimpleQueue()
    # A daemon, so that a read that never ends does not keep the process alive.
    self._thread = threading.Thread(target=_read, args=(iterator, self._asked, self._given), daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._asked.put(False)

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch that `next` returned."""
    return self._iterator.get_state() if self._position is None else self._position

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from a position; called before the first `next`."""
    self._iterator.set_state(state)

  def next(self, now: int) -> dict[str, Any]:
    """The batch of step `now`.

    Raises:
      NoBatch: reading it failed, took longer than `data_timeout`, or was under way when the run was interrupted.
    """
    # Kept while a batch is read: the iterator may have advanced already, or may never answer again.
    self._position = self._iterator.get_state()
    self._asked.put(True)
    began, said = time.monotonic(), 0
    while True:
      try:
        batch, error = self._given.get(timeout=min(1.0, self._options.slow_data, self._options.data_timeout))
        break
      except queue.Empty:
        waited = time.monotonic() - began
      if self._interruption.signal is not None and jax.process_count() == 1:
        raise NoBatch(f'the batch of step {now} had not arrived')
      if waited >= self._options.data_timeout:
        raise NoBatch(f'the batch of step {now} did not arrive within {waited:.0f} s (config.recovery.data_timeout)')
      if waited >= self._options.slow_data * (said + 1):
        said += 1
        self.say(f'Step {now}: {_who()}waited {waited:.0f} s for its batch. The data are slow, or their source '
                 f'hangs; the run ends after {self._options.data_timeout:.0f} s (config.recovery.data_timeout).')
    if error is not None:
      raise NoBatch(f'reading the batch of step {now} failed: {type(error).__name__}: {error}') from error
    self._position = None
    return batch


def _who():
  return f'process {jax.process_index()} ' if jax.process_count() > 1 else ''


def _read(iterator, asked, given):
  while asked.get():
    try:
      given.put((next(iterator), None))
    except Exception as error:  # noqa: BLE001  (whatever a data source raises ends the run, in the thread that waits)
      given.put((None, error))
