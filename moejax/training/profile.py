"""A trace of some steps, as `jax.profiler` writes it: what devices and host did, and when.

    profile/plugins/profile/steps_<first>_to_<last>/<host>.xplane.pb  <host>.trace.json.gz

Each process writes what its own host and devices did, and all of one trace lie together, as viewers expect.
"""
import contextlib
import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Annotated, Any

import jax

from moejax.config import ConfigError
from moejax.ranges import AtLeast, Count
from moejax.training.loggers import installed
from moejax.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """config.profile: which steps are traced.

  Attributes:
    start: the first of them; None: no step is. Step 1 compiles.
    steps: how many. Traces are large: some MB a step.
  """
  start: Annotated[int, AtLeast(2)] | None = None
  steps: Count = 5

  @property
  def last(self) -> int:
    """The last step that is traced; 0: no step is."""
    return 0 if self.start is None else self.start + self.steps - 1

  def check(self, total: int) -> None:
    """Raises ConfigError where the run has not all of these steps."""
    if self.last > total:
      raise ConfigError(f'config.profile traces steps {self.start} to {self.last}, and the run has {total} '
                        f'(config.training.steps). Set config.profile.start to at most {total - self.steps + 1}, or '
                        'config.profile.steps to fewer.')


class Profile:
  """Traces the steps that `options` names. A trace that an exception cuts short is closed and discarded.

  A process traces no step that it compiles in: one that resumes within the range begins with its second step, and
  says what it traces.

  Args:
    options: config.profile.
    folder: of the run.
    start: steps done before.
    shown: hears where not all of the range is traced; what tracing takes is not time of a step.
  """

  def __init__(self, options: ProfileConfig, folder: str | Path, start: int, shown: Progress):
    self._folder, self._shown = Path(folder) / 'profile', shown
    self._own = self._folder / f'process_{jax.process_index()}.partial'
    self._first, self._last, self._tracing = 0, 0, False
    if options.start is not None and start < options.last:
      self._first, self._last = max(options.start, start + 2), options.last
      if self._first > self._last:
        shown.say(f'The profile of steps {options.start} to {options.last} is not written: the run resumes in the last '
                  'of them, and compiles in it.')
      elif self._first > options.start:
        shown.say(f'The profile begins with step {self._first}, not {options.start}: the run resumes after step '
                  f'{start}, and compiles in the next.')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._tracing:
      with contextlib.suppress(Exception):  # what ends the run matters more
        jax.profiler.stop_trace()
      shutil.rmtree(self._own, ignore_errors=True)

  def step(self, now: int, state: Any) -> contextlib.AbstractContextManager:
    """The context of the dispatch of step `now`, which begins from `state`."""
    if now == self._first and now <= self._last:
      jax.block_until_ready(state)  # the steps before are not of the trace
      with self._shown.paused():
        shutil.rmtree(self._own, ignore_errors=True)
        jax.profiler.start_trace(self._own)
      self._tracing = True
    return jax.profiler.StepTraceAnnotation('train', step_num=now) if self._tracing else contextlib.nullcontext()

  def after(self, now: int, state: Any) -> None:
    """Step `now`, which leaves `state`, is on its way; the last of the range ends the trace."""
    if not self._tracing or now < self._last:
      return
    jax.block_until_ready(state)
    self._tracing = False
    with self._shown.paused():
      try:
        jax.profiler.stop_trace()
        self._collect()
      except (OSError, RuntimeError) as error:
        self._shown.say(f'The profile could not be written: {str(error).splitlines()[0]}. Training continues.')

  def _collect(self):
    together = self._folder / 'plugins' / 'profile' / f'steps_{self._first}_to_{self._last}'
    together.mkdir(parents=True, exist_ok=True)
    # jax names files by host and folders by the second: processes of one host would overwrite each other's.
    suffix = f'_{jax.process_index()}' if jax.process_count() > 1 else ''
    for path in self._own.glob('plugins/profile/*/*'):
      kind = next((kind for kind in ('.xplane.pb', '.trace.json.gz') if path.name.endswith(kind)), '')
      path.replace(together / f'{path.name.removesuffix(kind)}{suffix}{kind}')
    shutil.rmtree(self._own)


def where(folder: str | Path) -> str | None:
  """Where the traces of the run in `folder` are, and how to see them with what is installed; None without any."""
  traces = Path(folder) / 'profile'
  newest = max((traces / 'plugins' / 'profile').glob('*'), key=lambda path: path.stat().st_mtime, default=None)
  if newest is None:
    return None
  if installed('xprof'):
    return f'xprof --logdir {traces}'
  if installed('tensorboard') and importlib.util.find_spec('tensorboard_plugin_profile'):
    return f'tensorboard --logdir {traces}'
  return f'{newest}: open its .trace.json.gz at https://ui.perfetto.dev (or pip install xprof)'
