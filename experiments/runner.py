"""Runs a study: one process a run, all results in one JSON file beside the study.

A study is a folder with `sweep.py`, which yields its runs, and says which metrics compare them:

    METRICS = {'eval/test/accuracy': 'test accuracy'}

    def sweep():
      for seed in range(5):
        yield Run('dense', 'configs/vit_digits.py', seed)
        yield Run('sparse', 'configs/vmoe_digits.py', seed, {'model.moe.router.select.k': 1})

    python -m experiments.runner digits                what experiments/digits lacks
    python -m experiments.runner runs/mine --jobs=1    a folder elsewhere; one run at a time
    python -m experiments.runner runs/mine --check     builds every config, and runs nothing

All configs are checked before the first run. Runs divide the cores of a CPU (--jobs: into so many parts, by default
one core each) or have a GPU each; a TPU takes one at a time. Each result is written as its run ends. Interrupt it at
any time: the same command resumes, runs that had begun from their last checkpoints. A run that fails is named with its
log at the end, and the others finish. Exit codes: 0 all runs are done; 1 some failed; 2 something is wrong with the
study, a config or the command; 128 + n stopped by signal n.
"""
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from moejax import command_line, config_files, json_lines
from moejax.config import ConfigError, nearest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a study, of `moejax.train` where a study does not say otherwise.

  Attributes:
    name: the variant, e.g. 'vmoe'; runs of one name differ in their seed only.
    config: config file, as after `--config=`.
    seed: overrides `config.seed`.
    overrides: further keys after `config.`, and their values.
  """
  name: str
  config: str
  seed: int
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> str:
    """Names the run in results and in its workdir."""
    return f'{self.name.lower().replace(" ", "_")}-{self.seed}'

  def command(self, workdir: pathlib.Path) -> list[str]:
    """The train command of this run."""
    flags = [f'--config.{key}={value}' for key, value in {'seed': self.seed, **self.overrides}.items()]
    return ['python', '-m', 'moejax.train', f'--config={self.config}', f'--workdir={workdir}', *flags]

  def check(self, devices: list) -> None:
    """Builds what the command would build on `devices`, and compiles nothing.

    Raises:
      ConfigError: it could not train there.
    """
    from moejax.training import device_memory, setup
    values = {key: config_files.parse_value(str(value)) for key, value in self.overrides.items()}
    device_memory.check(setup.prepare(config_files.load(self.config, {'seed': self.seed, **values}), devices))

  def metrics(self, workdir: pathlib.Path) -> dict:
    """What its finished command left in its workdir."""
    return last_metrics(workdir)


@dataclasses.dataclass(frozen=True)
class Study:
  """What a folder with `sweep.py` says.

  Attributes:
    folder: where `results.json` and `figure.png` lie.
    runs: in the order of the sweep.
    metrics: `{key of metrics.jsonl: label}` of `METRICS`; empty: its runs are not compared.
  """
  folder: pathlib.Path
  runs: list[Run]
  metrics: Mapping[str, str]

  @property
  def workdirs(self) -> pathlib.Path:
    """Where its runs lie, each in a folder of its key beside its log; from `ROOT` where that is above."""
    ours = self.folder.parent == ROOT / 'experiments'
    return pathlib.Path('runs', self.folder.name) if ours else from_root(self.folder / 'runs')

  def results(self) -> dict | None:
    """What results.json holds; None where there are no results yet."""
    path = self.folder / 'results.json'
    return json.loads(path.read_text()) if path.exists() else None


def find(name: str) -> Study:
  """The study of a folder, or of a folder of `experiments/`.

  Raises:
    ConfigError: there is none, or two of its runs have one key.
  """
  folder = next((folder for folder in (pathlib.Path(name).resolve(), ROOT / 'experiments' / name)
                 if (folder / 'sweep.py').is_file()), None)
  if folder is None:
    known = [path.parent.name for path in ROOT.glob('experiments/*/sweep.py') if 'def sweep(' in path.read_text()]
    raise ConfigError(f'There is no study {name}: neither {name}/sweep.py nor experiments/{name}/sweep.py exists. '
                      f'{nearest(name, sorted(known))}')
  spec = importlib.util.spec_from_file_location(f'sweep_of_{folder.name}', folder / 'sweep.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'sweep'):
    raise ConfigError(f'{folder / "sweep.py"} has no function sweep(), which yields the runs of a study.')
  runs = list(module.sweep())
  keys = [run.key for run in runs]
  if twice := sorted({key for key in keys if keys.count(key) > 1}):
    raise ConfigError(f'{folder / "sweep.py"} yields {twice[0]} more than once: runs of one name need different seeds.')
  return Study(folder, runs, getattr(module, 'METRICS', {}))


def load(study: str) -> dict:
  """The committed results of a study; raises FileNotFoundError where there are none."""
  return json.loads((ROOT / 'experiments' / study / 'results.json').read_text())


def last_metrics(workdir: pathlib.Path) -> dict[str, float]:
  """The newest value of every scalar in a run's metrics.jsonl."""
  newest = {}
  for row in json_lines.read(workdir / 'metrics.jsonl'):
    newest.update({k: v for k, v in row.items() if isinstance(v, (int, float))})
  return newest


def environment() -> dict:
  """Where results come from: commit (`-dirty`: with changes to the code), machine, versions."""
  git = lambda *arguments: subprocess.run(['git', *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
  dirty = '-dirty' if git('status', '--porcelain', '--', 'moejax', 'configs') else ''
  model = [line.split(':')[1].strip() for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
           if line.startswith('model name')] if pathlib.Path('/proc/cpuinfo').exists() else []
  return dict(
      commit=git('rev-parse', '--short', 'HEAD') + dirty, date=datetime.date.today().isoformat(),
      machine=f'{os.cpu_count()} cores, {model[0] if model else platform.processor()}',
      python=platform.python_version(), **{name: metadata.version(name) for name in ('jax', 'flax', 'optax')})


def main(name: str, starts: tuple[str, ...] = (), jobs: int | None = None, check: bool = False) -> list[str]:
  """Runs what a study still lacks; of the runs whose keys begin with one of `starts`, where any are given.

  Args:
    name: of the study, or its folder.
    starts: of keys.
    jobs: runs at a time; as many as there are places for by default.
    check: stop after the checks.

  Returns:
    The keys of runs that failed.

  Raises:
    ConfigError: before the first run, where one of them cannot be made as the study says.
  """
  from experiments import checks, compare, schedule
  study = find(name)
  results = study.results() or dict(command=f'python -m experiments.runner {name}', runs=[])
  waiting = list(_waiting(study, results, starts))
  done = lambda: {run.key for run in study.runs} & {run['key'] for run in results['runs']}
  print(f'{name}: {len(study.runs)} runs, {len(done())} done, {len(waiting)} to do.', flush=True)
  failed = {}
  if waiting:
    machine = checks.check(study, waiting)
    planned = schedule.Schedule(study, waiting, results, machine, machine.places(jobs, len(study.runs)))
    print(planned.outlook(), flush=True)
    if check:
      return []
    failed = planned.run()
  if study.metrics and done():
    compare.show(study)
  print(f'Results: {from_root(study.folder / "results.json")}')
  if failed:
    print(f'{len(failed)} runs failed; the same command tries them again:')
    for key, why in failed.items():
      print(f'  {key}: {why}')
  return list(failed)


def _waiting(study: Study, results: dict, starts: tuple[str, ...]) -> Iterator[Run]:
  done = {run['key']: run['command'] for run in results['runs']}
  for run in study.runs:
    command = ' '.join(run.command(study.workdirs / run.key))
    if done.get(run.key, command) != command:
      raise ConfigError(
          f'results.json of {study.folder.name} has {run.key} by another command than sweep.py gives now:\n'
          f'  {done[run.key]}\n  {command}\nGive the variant another name, or remove the old runs from results.json.')
    if run.key not in done and run.key.startswith(starts or ''):
      yield run


def from_root(path: pathlib.Path) -> pathlib.Path:
  """`path` as it is written from the root of the repository, where it lies there."""
  return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def command() -> int:
  """The command."""
  flags = command_line.Parser('experiments.runner', __doc__, usage='STUDY [flags]')
  flags.add_argument('study', metavar='STUDY', help='a folder with sweep.py, or the name of one in experiments/')
  flags.add_argument('--jobs', metavar='N', type=int, help='runs at a time; by default as many as cores or GPUs')
  flags.add_argument('--check', action='store_true', help='build all configs, and run nothing')
  given = flags.parse()
  return 1 if main(given.study, jobs=given.jobs, check=given.check) else 0


if __name__ == '__main__':
  command_line.in_one_sentence(command)
