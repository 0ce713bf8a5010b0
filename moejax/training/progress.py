"""What the person who waits sees: a bar where a terminal is attached, a line at each row of metrics otherwise."""
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tqdm

from moejax.models.counts import parameter_counts
from moejax.parallel import rules


def describe(setup) -> list[str]:
  """What a run is made of, in the lines that it begins with."""
  devices, spec = setup.mesh.devices.flat, setup.pipeline.batch_spec()
  axes = ' '.join(f'{axis}={size}' for axis, size in setup.mesh.shape.items() if size > 1)
  processes = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
  with rules.use(setup.mesh, setup.rules):
    parameters = parameter_counts(setup.model, spec)
  unit, count = _work(spec)
  data = setup.config.data.get('source', setup.config.data).name
  schedule = setup.config.optimizer.schedule
  split = f' in {setup.training.accumulate} parts' if setup.training.accumulate > 1 else ''
  return [
      f'Devices        {len(devices)} {devices[0].device_kind}{processes}{f", mesh {axes}" if axes else ""}',
      f'Model          {setup.config.model.name}: {parameters["total"]:,} parameters, {parameters["active"]:,} active',
      f'Data           {data}: {count:,} {unit} a batch{split}, {setup.training.steps:,} steps',
      f'Learning rate  {schedule.name}: ' + ', '.join(f'{key} {schedule[key]}' for key in schedule if key != 'name')]


@contextlib.contextmanager
def announced(what: str, say: Callable[[str], None]) -> Iterator[None]:
  """Says what begins, and how long it took."""
  say(f'{what} ...')
  began = time.perf_counter()
  yield
  say(f'{what} took {_duration(time.perf_counter() - began)}.')


class Progress:
  """Counts steps and seconds of training; evaluation and checkpoints are not counted, nor is the first compilation.

  Args:
    setup: of the run.
    start: steps done before.
    say: receives lines where there is no terminal.
  """

  def __init__(self, setup, start: int, say: Callable[[str], None]):
    self._total = setup.training.steps
    self._unit, self._per_step = _work(setup.pipeline.batch_spec())
    self._say = say
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = tqdm.tqdm(total=self._total, initial=start, unit='step', dynamic_ncols=True)
    self._first = start + 1
    self._since, self._counted, self._rate = time.perf_counter(), start, 0.

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.close()

  def advance(self, now: int) -> None:
    """Step `now` is on its way."""
    if now == self._first:
      self._since, self._counted = time.perf_counter(), now
    if self._bar is not None:
      self._bar.update()

  def rate(self, now: int) -> dict[str, float]:
    """Examples or tokens a second since the last call, for step `now`, whose result the host holds."""
    elapsed = time.perf_counter() - self._since
    if now > self._counted and elapsed > 0:
      self._rate = (now - self._counted) / elapsed
    self._since, self._counted = time.perf_counter(), now
    return {f'time/{self._unit}_per_second': self._rate * self._per_step} if self._rate else {}

  def show(self, now: int, row: dict[str, Any]) -> None:
    """Loss, speed and time left."""
    speed = f'{_short(self._rate * self._per_step)} {self._unit}/s' if self._rate else ''
    left = _duration((self._total - now) / self._rate) + ' left' if self._rate else ''
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {row["train/loss"]:.4f}, {speed}')
    else:
      parts = [f'step {now}/{self._total}', f'loss {row["train/loss"]:.4f}', speed, left]
      self._say('  '.join(part for part in parts if part))

  def say(self, line: str) -> None:
    """A line that does not break the bar."""
    if self._bar is not None:
      self._bar.write(line)
    else:
      self._say(line)

  @contextlib.contextmanager
  def paused(self):
    """Time spent in this context is not training."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began


def _work(spec: dict[str, Any]) -> tuple[str, int]:
  """(unit, units in a batch): examples of images, tokens of text."""
  if 'loss_mask' in spec:
    return 'tokens', spec['loss_mask'].size
  return 'examples', next(iter(spec.values())).shape[0]


def _short(number: float) -> str:
  for limit, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= limit:
      return f'{number / limit:.1f}{suffix}'
  return f'{number:.0f}'


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'
