"""Runs the processes of a study side by side, says how far they are, and keeps what each gave."""
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import tqdm

from experiments import runner
from experiments.checks import Machine, Place
from moejax.config import ConfigError, Explained
from moejax.training.workdir import write_atomically


class Stopped(Explained):
  """A signal ended the study; what is done is kept."""


@dataclasses.dataclass
class Going:
  """A run whose process is alive."""
  run: runner.Run
  place: Place
  process: subprocess.Popen
  began: float
  resumed: str | None  # the commit at which it was first begun


class Schedule:
  """The runs of a study that wait, are going, are done, have failed.

  Args:
    study: whose results.json is written after each run.
    waiting: runs to do.
    results: what results.json holds.
    machine: where this is.
    places: one run at a time each.

  Raises:
    ConfigError: something else lies where a run would.
  """

  def __init__(self, study: runner.Study, waiting: list[runner.Run], results: dict, machine: Machine,
               places: list[Place]):
    self.study, self.results, self.machine = study, results, machine
    self.waiting, self.free, self.places = list(waiting), list(places), len(places)
    self.going: list[Going] = []
    self.failed: dict[str, str] = {}
    self.earlier = list(results['runs'])
    self.order = {run.key: place for place, run in enumerate(study.runs)}
    for run in waiting:
      _begun(self._path(run, ''), self._command(run))  # Refuses what could not be resumed, before the first run.

  def outlook(self) -> str:
    """How many runs there are to do, and how long that takes."""
    left = self.left()
    lasting = 'how long they take is known after the first' if left is None else f'about {_long(left)} by earlier runs'
    return f'{len(self.waiting)} runs, {self.places} at a time: {lasting}.'

  def run(self) -> dict[str, str]:
    """Does all that waits; returns `{key: why}` of the runs that failed.

    Raises:
      Stopped: by a signal.
    """
    with (tqdm.tqdm(total=len(self.waiting), disable=None, leave=False, dynamic_ncols=True,
                    bar_format='{n_fmt} of {total_fmt} runs |{bar}|{postfix}') as bar, _ended_by_signals()):
      looked = 0.
      try:
        while self.waiting or self.going:
          while self.waiting and self.free:
            self.going.append(self._begin(self.waiting.pop(0), self.free.pop(0)))
          for going, status, usage in self._ended():
            self.going.remove(going)
            self.free.append(going.place)
            bar.write(self._keep(going, status, usage), file=sys.stdout)
            bar.update()
          if not bar.disable and time.monotonic() > looked + 2:
            looked = time.monotonic()
            bar.set_postfix_str(self._now())
          time.sleep(0.1)
      finally:
        self._stop(bar)
    return self.failed

  def left(self) -> float | None:
    """Seconds to the end, by what runs of the same variant took, or else of any; None where no run has ended yet."""
    new = [row for row in self.results['runs'] if row not in self.earlier]
    expected = [self._expected(run, new) for run in self.waiting]
    going = [(self._expected(going.run, new), time.monotonic() - going.began) for going in self.going]
    if None in expected or None in dict(going):
      return None
    rest = expected + [max(0., whole - since) for whole, since in going]
    return max(sum(rest) / self.places, max(rest, default=0.))

  def _expected(self, run, new):
    whole = lambda rows: [row['seconds'] for row in rows if not row.get('resumed')]
    of_variant = lambda rows: [row for row in rows if row['name'] == run.name]
    for seconds in (whole(of_variant(new)), whole(of_variant(self.earlier)), whole(new), whole(self.earlier)):
      if seconds:
        return statistics.mean(seconds)
    return None

  def _path(self, run, ending):
    return runner.ROOT / self.study.workdirs / f'{run.key}{ending}'

  def _command(self, run):
    return run.command(self.study.workdirs / run.key)

  def _begin(self, run, place):
    command, log = self._command(run), self._path(run, '.log')
    resumed = _begun(self._path(run, ''), command)
    log.parent.mkdir(parents=True, exist_ok=True)
    if not resumed:
      self._path(run, '.begun').write_text(json.dumps(dict(command=command, commit=runner.environment()['commit'])))
    with log.open('a' if resumed else 'w') as out:
      # In a session of its own, so that Ctrl-C comes from here, once.
      process = subprocess.Popen([sys.executable, *command[1:]], cwd=runner.ROOT, stdout=out, stderr=subprocess.STDOUT,
                                 env={**os.environ, **place.environment}, start_new_session=True)
    if place.cores and hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(process.pid, place.cores)
    return Going(run, place, process, time.monotonic(), resumed)

  def _ended(self) -> Iterator[tuple]:
    for going in list(self.going):
      pid, status, usage = os.wait4(going.process.pid, os.WNOHANG)
      if pid:
        going.process.returncode = os.waitstatus_to_exitcode(status)
        yield going, going.process.returncode, usage

  def _keep(self, going, status, usage):
    """Writes what a run gave, or that it failed; returns the line that says so."""
    run, seconds, log = going.run, time.monotonic() - going.began, self._path(going.run, '.log')
    try:
      metrics = None if status else run.metrics(self._path(run, ''))
    except KeyError as error:
      metrics, status = None, f'it measured no {error.args[0]}'
    if metrics is not None and (missing := [key for key in self.study.metrics if key not in metrics]):
      status = f'it measured no {missing[0]}; there are {", ".join(metrics)}'
    if status:
      self.failed[run.key] = f'{_why(status, log)}; log: {runner.from_root(log)}'
      return f'{run.key} failed after {_long(seconds)}.'
    here = runner.environment()
    if self.machine.platform != 'cpu':
      here['machine'] = f'{self.machine.kind}, {here["machine"]}'
    mebibytes = usage.ru_maxrss / (1024 if sys.platform == 'linux' else 2**20)
    self.results['runs'].append(dict(
        key=run.key, name=run.name, seed=run.seed, command=' '.join(self._command(run)), seconds=round(seconds, 1),
        peak_memory_mib=round(mebibytes), cores=len(going.place.cores or range(os.cpu_count())),
        **dict(resumed=going.resumed) if going.resumed else {}, **here, metrics=metrics))
    self.results['runs'].sort(key=lambda row: self.order.get(row['key'], len(self.order)))
    write_atomically(self.study.folder / 'results.json', json.dumps(self.results, indent=1) + '\n')
    self._path(run, '.begun').unlink()
    to_do = len(self.waiting) + len(self.going)
    return (f'{run.key}: {_long(seconds)}, {mebibytes:.0f} MiB'
            + (f'; {to_do} to do' if to_do else '') + self._in_words() + '.')

  def _now(self):
    steps = ', '.join(f'{going.run.key} step {runner.last_metrics(self._path(going.run, "")).get("step", 0)}'
                      for going in self.going)
    return steps + self._in_words()

  def _in_words(self):
    left = self.left()
    return f', about {_long(left)} left' if left else ''

  def _stop(self, bar):
    if not self.going:
      return
    bar.write('Stopping once the runs have saved; the same signal again stops at once.', file=sys.stdout)
    for going in self.going:
      going.process.terminate()
    try:
      for going in self.going:
        going.process.wait()
    finally:
      for going in self.going:
        going.process.kill()


def _begun(workdir: pathlib.Path, command: list[str]) -> str | None:
  """The commit at which the run of this command began in `workdir`; None where there is no run to resume.

  Raises:
    ConfigError: something else lies there: the run of another command, or one whose results have been removed since.
  """
  note = workdir.with_name(f'{workdir.name}.begun')
  if not workdir.exists():
    return None
  if note.exists() and (begun := json.loads(note.read_text()))['command'] == command:
    return begun['commit']
  name = runner.from_root(workdir)
  raise ConfigError(f'{name} is not of a run that could be resumed: another command made it, or it has ended and '
                    f'results.json does not have it any more. Remove it (rm -r {name}) to make the run anew.')


def _why(status: int | str, log: pathlib.Path) -> str:
  if isinstance(status, str):
    return status
  if status < 0:
    return f'killed by {signal.Signals(-status).name}'
  said = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
  return said[-1].strip()[:300] if said else f'exit code {status}'


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
  def end(number, frame):
    del frame
    error = Stopped('Stopped. The same command resumes.')
    error.code = 128 + number
    raise error
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = [signal.signal(number, end) for number in numbers]
  try:
    yield
  finally:
    for number, handler in zip(numbers, before):
      signal.signal(number, handler)


def _long(seconds: float) -> str:
  minutes = round(seconds / 60)
  return f'{seconds:.0f} s' if seconds < 100 else f'{minutes} min' if minutes < 100 else f'{minutes / 60:.1f} h'
