"""Runs a study: one process a run, all results in one JSON file beside the study.

A study is a folder with `sweep.py`, which yields its runs:

    def sweep():
      for seed in range(3):
        yield Run('vmoe', 'configs/vmoe_digits.py', seed)

`python -m experiments.runner digits` runs what is not in `experiments/digits/results.json` yet, each run on a core of its
own so that their times can be compared, and writes the file after each. Interrupt it at any time; the same command goes on.
"""
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import threading
import time
from concurrent import futures
from importlib import metadata

from moejax import json_lines

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a study, of `moejax.train` where a study does not say otherwise.

  Attributes:
    name: the variant, e.g. 'vmoe'; runs of one name differ in their seed only.
    config: config file, as after `--config=`.
    seed: overrides `config.seed`.
    overrides: further `config.` keys and their values.
  """
  name: str
  config: str
  seed: int
  overrides: tuple[tuple[str, str], ...] = ()

  @property
  def key(self) -> str:
    """Names the run in results and in its workdir."""
    return f'{self.name.lower().replace(" ", "_")}-{self.seed}'

  def command(self, workdir: pathlib.Path) -> list[str]:
    """The train command of this run."""
    flags = [f'--config.{key}={value}' for key, value in (('seed', self.seed), *self.overrides)]
    return ['python', '-m', 'moejax.train', f'--config={self.config}', f'--workdir={workdir}', *flags]

  def metrics(self, workdir: pathlib.Path) -> dict:
    """What its finished command left in its workdir."""
    return last_metrics(workdir)


def load(study: str) -> dict:
  """The committed results of a study; raises FileNotFoundError where there are none."""
  return json.loads((ROOT / 'experiments' / study / 'results.json').read_text())


def summarize(results: dict, metric: str) -> dict[str, tuple[float, float, int]]:
  """`{name: (mean, standard deviation over seeds, number of seeds)}` of a metric, in the order of the sweep."""
  values: dict[str, list[float]] = {}
  for run in results['runs']:
    values.setdefault(run['name'], []).append(run['metrics'][metric])
  summary = {}
  for name, numbers in values.items():
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / max(1, len(numbers) - 1)
    summary[name] = (mean, variance ** 0.5, len(numbers))
  return summary


def last_metrics(workdir: pathlib.Path) -> dict[str, float]:
  """The newest value of every scalar in a run's metrics.jsonl."""
  newest = {}
  for row in json_lines.read(workdir / 'metrics.jsonl'):
    newest.update({k: v for k, v in row.items() if isinstance(v, (int, float))})
  return newest


def measure(command: list[str], log: pathlib.Path, cores: set[int]) -> tuple[float, float]:
  """Runs `command` on `cores` to its end; returns (seconds, peak resident memory in MiB) of that one process.

  Raises RuntimeError, with the end of the log, where it fails.
  """
  log.parent.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  with log.open('w') as out:
    process = subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: os.sched_setaffinity(0, cores))  # noqa: PLW1509 (one thread)
    _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f'{" ".join(command)} failed; {log} ends with\n{log.read_text()[-2000:]}')
  return time.monotonic() - start, usage.ru_maxrss / 1024


def environment() -> dict:
  """Where results come from: commit, machine, versions."""
  git = lambda *arguments: subprocess.run(['git', *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
  model = [line.split(':')[1].strip() for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
           if line.startswith('model name')] if pathlib.Path('/proc/cpuinfo').exists() else []
  return dict(
      commit=git('rev-parse', '--short', 'HEAD'), date=datetime.date.today().isoformat(),
      machine=f'{os.cpu_count()} cores, {model[0] if model else platform.processor()}',
      python=platform.python_version(), **{name: metadata.version(name) for name in ('jax', 'flax', 'optax')})


def main(study: str, starts: tuple[str, ...] = ()) -> list[str]:
  """Runs what a study still lacks; of the runs whose keys begin with one of `starts`, where any are given.

  Returns the keys of runs that failed. What they said last is printed, and the others go on.
  """
  runs = list(importlib.import_module(f'experiments.{study}.sweep').sweep())
  path = ROOT / 'experiments' / study / 'results.json'
  results = load(study) if path.exists() else dict(command=f'python -m experiments.runner {study}', runs=[])
  order = [run.key for run in runs]
  done = {run['key'] for run in results['runs']}
  waiting = [run for run in runs if run.key not in done and run.key.startswith(starts or '')]
  print(f'{study}: {len(runs)} runs, {len(done)} done, {len(waiting)} to do.', flush=True)
  free, lock, failed = queue.Queue(), threading.Lock(), []
  # A run that is alone, as a study of what a command costs is, has the machine for itself.
  for cores in [{core} for core in os.sched_getaffinity(0)] if len(runs) > 1 else [os.sched_getaffinity(0)]:
    free.put(cores)

  def one(run):
    cores, workdir = free.get(), pathlib.Path('runs') / study / run.key
    command = run.command(workdir)
    try:
      seconds, mebibytes = measure(command, ROOT / 'runs' / study / f'{run.key}.log', cores)
      metrics = run.metrics(ROOT / workdir)
    except (RuntimeError, KeyError) as error:
      print(f'{run.key} failed: {error}', flush=True)
      failed.append(run.key)
      return
    finally:
      free.put(cores)
    with lock:
      results['runs'].append(dict(
          key=run.key, name=run.name, seed=run.seed, command=' '.join(command), seconds=round(seconds, 1),
          peak_memory_mib=round(mebibytes), cores=len(cores), **environment(), metrics=metrics))
      results['runs'].sort(key=lambda run: order.index(run['key']))
      path.write_text(json.dumps(results, indent=1) + '\n')
      print(f'{run.key}: {seconds:.0f} s, {mebibytes:.0f} MiB; {len(results["runs"])} of {len(runs)} done.', flush=True)

  with futures.ThreadPoolExecutor(free.qsize()) as pool:
    list(pool.map(one, waiting))
  figure = f', python -m experiments.{study}.plot' if path.with_name('plot.py').exists() else ''
  if failed:
    print(f'{len(failed)} runs failed: {", ".join(failed)}. The same command runs what is missing.')
  print(f'Results: {path.relative_to(ROOT)}. Next: python -m experiments.tables (fills the README){figure}')
  return failed


if __name__ == '__main__':
  sys.exit(1 if main(sys.argv[1]) else 0)
