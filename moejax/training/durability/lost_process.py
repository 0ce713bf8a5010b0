"""When a process of the run dies, the others stop with a message instead of waiting for it.

A death shows in one of two ways. A collective fails, as gloo's do at once; or jax's coordination service misses
heartbeats of the dead process (within the 20 s of `processes.start`) or the first process itself (at once), and ends
every other by SIGABRT, from a thread of its own, which prints its stack.
"""
import contextlib
import ctypes
import os
import re
import signal
from collections.abc import Iterator

import jax

from moejax.training.durability.stop_reasons import Stopped

_LOST = re.compile(r'gloo|nccl|closed by peer|reset by peer|socket closed|coordination service|heartbeat|unavailable',
                   re.IGNORECASE)
_NEXT = 'Start all processes again: the same command resumes from the last checkpoint.'


class ProcessLost(Stopped):
  """Another process of the run has died. Nothing that needs all processes can be done any more."""
  code = 3
  at_once = True


@contextlib.contextmanager
def noticed() -> Iterator[None]:
  """Within this context a run of several processes that loses one ends with `ProcessLost`, or with its exit code.

  Raises:
    ProcessLost: an operation failed because another process has died.
  """
  if jax.process_count() == 1:
    yield
    return
  with _abort_says(f'\n{_who()}: jax aborted this process for the reason above; most likely another one has died. '
                   f'{_NEXT}\n'):
    try:
      yield
    except Exception as error:
      check(error)
      raise


def check(error: Exception) -> None:
  """Raises `ProcessLost` from `error` if it shows that another process of the run has died."""
  of_jax = isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError
  if of_jax and jax.process_count() > 1 and _LOST.search(str(error)):
    reason = str(error).splitlines()[0]
    raise ProcessLost(f'{_who()}: another process of the run has died ({reason}). {_NEXT}') from error


def _who():
  return f'Process {jax.process_index()}'


@contextlib.contextmanager
def _abort_says(message: str) -> Iterator[None]:
  # Python's own signal handlers wait for the main thread, which may wait for the dead process. The callback that jax
  # has for this cannot be used: it fails to pass its argument to Python.
  text = message.encode()

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def say_and_exit(number):
    del number
    try:
      os.write(2, text)
    finally:  # the reader may be gone
      os._exit(ProcessLost.code)

  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  before = libc.signal(signal.SIGABRT, ctypes.cast(say_and_exit, ctypes.c_void_p))
  try:
    yield
  finally:
    libc.signal(signal.SIGABRT, before)
