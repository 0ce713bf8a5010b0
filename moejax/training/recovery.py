"""What ends a run early, and the message then: a signal, divergence, missing data or checkpoints."""
import contextlib
import os
import signal
from typing import Any

import numpy as np

from moejax.config import Explained


class Stopped(Explained):
  """The run ended early in a way that one sentence explains."""
  code = 1


class Interrupted(Stopped):
  """A signal asked the run to end; its state is saved."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.code = 128 + signal_number


class Diverged(Stopped):
  """Batch after batch had to be skipped, and going back did not help."""


class NoData(Stopped):
  """A batch did not come in time; the thread that waits for it ends only with the process."""
  at_once = True


class NoCheckpoint(Stopped):
  """No checkpoint can be read, or the last one could not be written."""


class Interruption:
  """Within this context Ctrl-C and SIGTERM only set `signal`, and say `notice`; the loop stops where it can.

  A second signal ends the process at once.
  """

  def __init__(self, notice: str = 'Stopping after this step, once it is saved; the same signal again stops at once.'):
    self._notice = notice
    self.signal: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      with contextlib.suppress(ValueError):  # not the main thread (a notebook's worker): signals are another's business
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
    with contextlib.suppress(OSError):  # nobody may be listening
      os.write(2, f'\n{self._notice}\n'.encode())


def locate(metrics: dict[str, Any], batch: dict[str, Any]) -> str:
  """Where values first stop being finite, in the order of computation: batch, routers by depth, then gradients.

  One bad layer spoils all layers above it on the way up, and all below it on the way down; so of the routers the first
  is named, and gradients (by module) only where the forward pass was sound.
  """
  for name, values in batch.items():
    if np.issubdtype(np.asarray(values).dtype, np.floating) and not np.isfinite(values).all():
      rows = np.flatnonzero(~np.isfinite(np.asarray(values)).reshape(len(values), -1).all(-1))
      return f'The batch itself is not finite: {name!r}, examples {rows[:8].tolist()}.'
  for name in sorted(metrics):
    if name.startswith('router/') and not np.isfinite(metrics[name]).all():
      _, layer, metric = name.split('/', 2)
      return f'First layer that is not finite: {layer} (its router\'s {metric}).'
  gradients = {name.removeprefix('gradient_norm/'): np.isfinite(norm)
               for name, norm in metrics.items() if name.startswith('gradient_norm/')}
  bad = sorted(module for module, finite in gradients.items() if not finite)
  if bad and len(bad) < len(gradients):
    return (f'Every router is finite; gradients are not in {len(bad)} of {len(gradients)} modules: '
            f'{", ".join(bad[:6])}{", ..." if len(bad) > 6 else ""}.')
  if bad:
    return 'Every router is finite, and the gradient of every module is not: look at what follows the last router.'
  if not np.isfinite(metrics['train/grad_norm']):
    return 'Every single gradient is finite, but their norm overflows.'
  parts = [name for name in sorted(metrics)
           if name.startswith('train/') and name != 'train/loss' and not np.isfinite(metrics[name]).all()]
  named = f': {", ".join(parts)}' if parts else ''
  return f'Every router and every gradient is finite; the loss alone is not{named}.'
