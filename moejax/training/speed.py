"""How fast a run is and what memory it takes, as metrics.

    time/tokens_per_second (or examples)   time/step_seconds           memory/device_peak_bytes
      ..._per_device                       time/slowest_step_seconds   memory/process_peak_bytes
    time/mfu

A step lasts from when the devices have completed the one before to when they have completed it: waiting for data is in
it, compilation, evaluation and saving are not.
"""
import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.models.counts import forward_flops
from moejax.parallel import chips


class Clock:
  """Seconds of each step.

  Args:
    first: the first step of this process, in which it compiles: the clock starts when that is completed.
  """

  def __init__(self, first: int):
    self._last, self._since, self._seconds = first - 1, None, []

  def completed(self, step: int) -> None:
    """The devices have completed `step`. Calls that say nothing new are ignored."""
    if step <= self._last:
      return
    now = time.perf_counter()
    if self._since is not None:
      self._seconds += [(now - self._since) / (step - self._last)] * (step - self._last)
    self._last, self._since = step, now

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time spent in this context belongs to no step."""
    began = time.perf_counter()
    yield
    if self._since is not None:
      self._since += time.perf_counter() - began

  def take(self) -> list[float]:
    """Seconds of each step completed since the last call."""
    taken, self._seconds = self._seconds, []
    return taken


class Speed:
  """Metrics of step times, for the batches and devices of `setup`.

  Attributes:
    unit: 'tokens' of text, else 'examples'.
    per_step: how many of them a batch has, padding included.
  """

  def __init__(self, setup):
    self.unit, self.per_step = work(setup.pipeline.batch_spec())
    self._devices = setup.mesh.size
    chip = chips.of_kind(setup.mesh.devices.flat[0].device_kind)
    # Counting traces the model, which takes seconds; nobody would see it.
    self._flops_per_peak = None if chip is None else model_flops(setup) / (chip.peak * self._devices)

  def __call__(self, seconds: Sequence[float]) -> dict[str, float]:
    """`time/*` of steps that took `seconds`; {} for none.

    `time/mfu` is model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B): `model_flops` over what the devices
    could compute in the mean time of a step, at their bfloat16 peak, whatever the dtype of the model. It is left out
    for devices whose peak `parallel.chips` does not have, such as a CPU.
    """
    if not seconds:
      return {}
    mean = sum(seconds) / len(seconds)
    found = {f'time/{self.unit}_per_second': self.per_step / mean}
    if self._devices > 1:
      found[f'time/{self.unit}_per_second_per_device'] = self.per_step / mean / self._devices
    found |= {'time/step_seconds': mean, 'time/slowest_step_seconds': max(seconds)}
    if self._flops_per_peak is not None:
      found['time/mfu'] = self._flops_per_peak / mean
    return found


def model_flops(setup) -> float:
  """FLOPs that the model asks for in a step, over all devices: three times those of its forward passes.

  A backward pass takes two products for each of a forward pass. `forward_flops` counts products one by one: those of
  active parameters (the experts that tokens choose, dropped choices included) and of attention, over all pairs of
  positions, as PaLM does (arXiv 2204.02311, appendix B: 6N + 12LHQT a token). Recomputation, padding of experts and
  one-hot dispatch are not counted: they are what utilization is lost to.
  """
  return 3 * setup.method.passes * forward_flops(setup.model, setup.pipeline.batch_spec())


def memory(devices: Sequence[Any]) -> dict[str, int]:
  """The peak of memory in this process so far, in bytes: `memory/device_peak_bytes` of the fullest of `devices`.

  A CPU does not report one; its arrays lie in the memory of the process, `memory/process_peak_bytes`.
  """
  peaks = [stats['peak_bytes_in_use'] for device in devices
           if (stats := device.memory_stats()) and 'peak_bytes_in_use' in stats]
  if peaks:
    return {'memory/device_peak_bytes': max(peaks)}
  unit = 1 if sys.platform == 'darwin' else 1024
  return {'memory/process_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def work(spec: dict[str, Any]) -> tuple[str, int]:
  """(unit, units in a batch): examples of images, tokens of text."""
  if 'loss_mask' in spec:
    return 'tokens', spec['loss_mask'].size
  return 'examples', next(iter(spec.values())).shape[0]
