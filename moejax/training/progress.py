"""Progress of a run: a bar in a terminal, otherwise a line for each row of metrics."""
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from moejax import units
from moejax.models.counts import parameter_counts
from moejax.parallel import rules
from moejax.training import speed


def describe(setup) -> list[str]:
  """The first lines of a run: devices, model, data and learning rate."""
  devices, spec = setup.mesh.devices.flat, setup.pipeline.batch_spec()
  axes = ' '.join(f'{axis}={size}' for axis, size in setup.mesh.shape.items() if size > 1)
  processes = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
  with rules.use(setup.mesh, setup.rules):
    parameters = parameter_counts(setup.model, spec)
  unit, count = speed.work(spec)
  data = setup.config.data.get('source', setup.config.data).name
  schedule = setup.config.optimizer.schedule
  split = f' in {setup.training.accumulate} microbatches' if setup.training.accumulate > 1 else ''
  return [
      f'Devices        {len(devices)} {devices[0].device_kind}{processes}{f", mesh {axes}" if axes else ""}',
      f'Model          {setup.config.model.name}: {parameters["total"]:,} parameters, {parameters["active"]:,} active',
      f'Data           {data}: {count:,} {unit} a batch{split}, {setup.training.steps:,} steps',
      f'Learning rate  {schedule.name}: ' + ', '.join(f'{key} {schedule[key]}' for key in schedule if key != 'name')]


@contextlib.contextmanager
def announced(what: str, say: Callable[[str], None]) -> Iterator[None]:
  """Reports that `what` begins, and how long it took."""
  say(f'{what} ...')
  began = time.perf_counter()
  yield
  say(f'{what} took {_duration(time.perf_counter() - began)}.')


class Progress:
  """Counts and times steps, and shows the progress of the run.

  Args:
    setup: of the run.
    start: steps already done.
    say: receives lines if there is no terminal.
  """

  def __init__(self, setup, start: int, say: Callable[[str], None]):
    self._total, self._devices = setup.training.steps, setup.mesh.local_devices
    self._speed, self._clock = speed.Speed(setup), speed.Clock(start + 1)
    self._say = say
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = tqdm.tqdm(total=self._total, initial=start, unit='step', dynamic_ncols=True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.close()

  def advance(self) -> None:
    """A step has been dispatched."""
    if self._bar is not None:
      self._bar.update()

  def completed(self, step: int) -> None:
    """The devices have completed `step`."""
    self._clock.completed(step)

  def paused(self) -> contextlib.AbstractContextManager[None]:
    """Time spent in this context is not training."""
    return self._clock.paused()

  def measured(self) -> dict[str, float]:
    """`time/*` of the steps since the last call, and `memory/*`."""
    return self._speed(self._clock.take()) | speed.memory(self._devices)

  def show(self, now: int, row: dict[str, Any]) -> None:
    """The line of step `now`: loss, speed, memory, balance of the experts, and the time left."""
    parts = [f'loss {row["train/loss"]:.4f}', *self._pace(row), *balance(row)]
    if self._bar is not None:
      self._bar.set_postfix_str(', '.join(parts))
      return
    if (seconds := row.get('time/step_seconds')) is not None:
      parts.append(_duration((self._total - now) * seconds) + ' left')
    self._say('  '.join([f'step {now}/{self._total}', *parts]))

  def _pace(self, row):
    if (rate := row.get(f'time/{self._speed.unit}_per_second')) is not None:
      yield f'{_short(rate)} {self._speed.unit}/s'
      mean, slowest = row['time/step_seconds'], row['time/slowest_step_seconds']
      yield f'{units.duration(mean)} a step' + (f' (slowest {units.duration(slowest)})' if slowest > mean else '')
    if (mfu := row.get('time/mfu')) is not None:
      yield f'MFU {mfu:.1%}'
    yield units.size(next(value for name, value in row.items() if name.startswith('memory/')))

  def say(self, line: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(line)
    else:
      self._say(line)


def balance(row: dict[str, Any]) -> list[str]:
  """A row's router metrics in words, for the layer where each is worst; [] without routers.

  The share of the busiest expert, in multiples of an equal share, 1/E, and the share of dropped choices, if any.
  """
  of = lambda metric: [value for name, value in row.items()
                       if name.startswith('router/') and name.endswith(f'/{metric}') and np.isfinite(value).all()]
  loads, dropped = of('load'), max(of('dropped'), default=0)
  busiest = [f'busiest expert {max(len(load) * max(load) for load in loads):.2f}x'] if loads else []
  return busiest + ([f'{dropped:.1%} dropped'] if dropped else [])


def _short(number: float) -> str:
  for limit, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= limit:
      return f'{number / limit:.1f}{suffix}'
  return f'{number:.0f}'


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'
