"""Batches, waited for: what is slow is said, and what never comes ends the run instead of hanging it."""
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from moejax.training import recovery


class NoBatch(Exception):
  """There is no next batch; the cause is what the data raised, or nothing where it was waited for in vain."""


class Batches:
  """The batches of a run, read by a thread of their own when they are asked for.

  Args:
    opened: makes an iterator over the training data, with `get_state` and `set_state`.
    options: config.recovery.
    stopping: whether the run has been asked to stop: then nothing is waited for.
    say: receives sentences for the person who runs this.

  Attributes:
    iterator: stands after the batches that were given out.
  """

  def __init__(self, opened: Callable[[], Any], options, stopping: Callable[[], bool], say: Callable[[str], None]):
    self._opened, self._options, self._stopping, self.say = opened, options, stopping, say
    self.iterator = opened()
    self._start()

  def _start(self):
    self._asked, self._given = queue.SimpleQueue(), queue.SimpleQueue()
    # A daemon, so that a read that never ends does not keep the process.
    threading.Thread(target=_read, args=(self.iterator, self._asked, self._given), name='batches', daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._asked.put(False)

  def next(self, now: int) -> dict[str, Any]:
    """The batch of step `now`.

    Raises:
      NoBatch: reading it failed, took longer than `data_timeout`, or was slow while the run was to stop. `iterator` is
        then another one, which stands where this one stood before.
    """
    before = self.iterator.get_state()
    self._asked.put(True)
    began, said = time.monotonic(), 0
    while True:
      try:
        batch, error = self._given.get(timeout=min(1.0, self._options.slow_data, self._options.data_timeout))
        if error is not None:
          raise self._without(before, f'reading the batch of step {now} failed: {type(error).__name__}: {error}') from error
        return batch
      except queue.Empty:
        waited = time.monotonic() - began
      if self._stopping():
        raise self._without(before, f'the batch of step {now} had not come for {waited:.0f} s')
      if waited >= self._options.data_timeout:
        raise self._without(before, f'the batch of step {now} has not come for {waited:.0f} s '
                            '(config.recovery.data_timeout)')
      if waited >= self._options.slow_data * (said + 1):
        said += 1
        self.say(f'Step {now}: waiting for its batch for {waited:.0f} s. The data are slow, or their source hangs; the run '
                 f'ends after {self._options.data_timeout:.0f} s (config.recovery.data_timeout).')

  def _without(self, before, reason):
    self._asked.put(False)
    self.iterator = self._opened()
    self.iterator.set_state(before)
    return NoBatch(reason)


def _read(iterator, asked, given):
  while asked.get():
    try:
      given.put((next(iterator), None))
    except Exception as error:  # noqa: BLE001  (whatever a data source raises ends the run, in the thread that waits)
      given.put((None, error))
