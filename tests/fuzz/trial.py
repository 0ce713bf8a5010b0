"""One mutant: built, its training step traced, and judged; or trained for two steps."""
import dataclasses
import functools
import re
import resource
import signal
import tempfile
import time
import traceback

import jax

from moejax.config import ConfigError
from moejax.data import DataError
from moejax.data.source import MissingPackage
from moejax.training import device_memory, loop, setup, step
from moejax.training.durability.stop_reasons import Stopped

SECONDS = 20.  # of CPU time
BYTES = 4 * 2**30


class OutOfTime(BaseException):
  """Not an Exception: nothing on the way may catch it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a mutant.

  Attributes:
    verdict: 'accepted' and traced; 'refused' in a sentence that names the key; or a fault: 'unclear' for a refusal that
      has several lines or names no key, 'traceback', 'hang', 'memory', and 'died' where the process ended.
    seconds: of CPU time.
    message: the sentence, or the last line of the traceback.
    place: where it was raised.
  """
  verdict: str
  seconds: float
  message: str = ''
  place: str = ''


def attempt(config: dict) -> Outcome:
  """Prepares a run of `config`, and traces its training step; a clock that runs out is a hang."""
  start = time.process_time()
  try:
    with _clock(SECONDS):
      built = setup.prepare(config)
      state = jax.eval_shape(step.init_function(built))
      jax.eval_shape(functools.partial(step.train_step, built), state, built.pipeline.batch_spec())
    verdict, error = 'accepted', None
  except (ConfigError, DataError) as refusal:
    clear = '\n' not in str(refusal) and re.search(r'\bconfig\.\w', str(refusal))
    verdict, error = 'refused' if clear else 'unclear', refusal
  except OutOfTime as late:
    verdict, error = 'hang', late
  except MemoryError as full:
    verdict, error = 'memory', full
  except Exception as fault:  # whatever it is: it should have been a sentence
    verdict, error = 'traceback', fault
  seconds = time.process_time() - start
  if error is None:
    return Outcome(verdict, seconds)
  text = str(error) if verdict in ('refused', 'unclear') else f'{type(error).__name__}: {error}'.split('\n')[0]
  return Outcome(verdict, seconds, text[:600], _place(error))


def train(config: dict) -> Outcome:
  """Two steps and an evaluation of a config that was accepted: whatever goes wrong now was found too late."""
  config['training'] |= dict(steps=2, log_every=1)
  schedule = config['optimizer']['schedule']
  schedule |= {key: value for key, value in dict(warmup=1, cooldown=0).items() if key in schedule}
  config['evaluation']['every'] = 1
  config['checkpoint'] |= dict(every=1, metric=None)
  config['report'] = dict(at='never')
  start = time.process_time()
  try:
    device_memory.check(setup.prepare(config))
  except ConfigError as reason:  # of this machine's memory
    return Outcome('refused', time.process_time() - start, str(reason)[:600], _place(reason))
  try:
    with tempfile.TemporaryDirectory() as folder:
      loop.run(config, folder, say=lambda line: None)
  except (DataError, MissingPackage, Stopped) as reason:  # of the data, of a package that they need, or of the numbers
    return Outcome('refused', time.process_time() - start, str(reason)[:600], _place(reason))
  except Exception as fault:
    return Outcome('late', time.process_time() - start, f'{type(fault).__name__}: {fault}'[:600], _place(fault))
  return Outcome('ran', time.process_time() - start)


def limit_memory() -> None:
  """Of this process, from now on: numpy and Python then raise MemoryError."""
  resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))


class _clock:
  def __init__(self, seconds):
    self._seconds = seconds

  def __enter__(self):
    self._before = signal.signal(signal.SIGPROF, self._ring)
    signal.setitimer(signal.ITIMER_PROF, self._seconds)

  def __exit__(self, *_):
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, self._before)

  def _ring(self, *_):
    raise OutOfTime(f'not done after {self._seconds} s of CPU time')


def _place(error) -> str:
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if '/moejax/' in frame.filename]
  return f'{frames[-1].filename.rpartition("/moejax/")[2]}:{frames[-1].lineno}' if frames else ''
