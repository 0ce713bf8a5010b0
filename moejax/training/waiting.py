"""Batches, waited for: what is slow is said, and what never comes ends the run instead of hanging it."""
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from moejax.training.recovery import Interruption
from moejax.training.spikes import RecoveryConfig


class NoBatch(Exception):
  """There is no next batch. The cause is what the data raised; it has none where it was waited for in vain."""


class Batches:
  """The batches of a run, read by a thread of their own when they are asked for.

  Args:
    iterator: over the training data.
    options: config.recovery.
    interruption: a process on its own waits no longer when it is asked to stop.
    say: receives sentences for the person who runs this.
  """

  def __init__(self, iterator: Any, options: RecoveryConfig, interruption: Interruption, say: Callable[[str], None]):
    self._iterator, self._options, self._interruption, self.say = iterator, options, interruption, say
    self._position = None
    self._asked, self._given = queue.SimpleQueue(), queue.SimpleQueue()
    # A daemon, so that a read that never ends does not keep the process.
    self._thread = threading.Thread(target=_read, args=(iterator, self._asked, self._given), daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._asked.put(False)

  def get_state(self) -> dict[str, Any]:
    """The position after the batches that were given out."""
    return self._iterator.get_state() if self._position is None else self._position

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a position; before the first batch is asked for."""
    self._iterator.set_state(state)

  def next(self, now: int) -> dict[str, Any]:
    """The batch of step `now`.

    Raises:
      NoBatch: reading it failed, took longer than `data_timeout`, or had not ended when the run was asked to stop.
    """
    # Kept while a batch is read, for the iterator may have moved on, or may never answer again.
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
        raise NoBatch(f'the batch of step {now} had not come')
      if waited >= self._options.data_timeout:
        raise NoBatch(f'the batch of step {now} has not come for {waited:.0f} s (config.recovery.data_timeout)')
      if waited >= self._options.slow_data * (said + 1):
        said += 1
        self.say(f'Step {now}: {_who()}has waited {waited:.0f} s for its batch. The data are slow, or their source '
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
