"""Kills training at random moments and damages its files and data: does every run end as if nothing had happened?

    python -m experiments.faults.sweep [--kills=200] [--kinds=kill,corrupt] [--seed=0]

A run is started, disturbed and restarted until it finishes; its metrics must then be bit-identical to those of an
undisturbed run. The sweep can be interrupted at any time: the same command resumes it.
"""
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import sklearn.datasets  # noqa: F401  (imported once, for all processes that are forked from this one)
from absl import app, flags

from experiments import runner
from experiments.faults import kinds, report
from experiments.faults.process import Processes
from moejax.training import metrics

RESULTS = runner.ROOT / 'experiments/faults/results.json'
_HANGS = 180  # seconds after which a process that should have ended counts as hanging


def quotas(kills: int, names: list[str]) -> dict[str, int]:
  """Number of faults of each kind: `kills` in total for kinds that kill, the others in proportion."""
  wanted = {name: math.ceil(kills * share) for name, (_, share) in kinds.KILLS.items()}
  wanted |= {name: math.ceil(number * kills / 200) for name, (_, number) in kinds.OTHERS.items()}
  return {name: number for name, number in wanted.items() if name in (names or wanted)}


def run(name: str, seed: str, limit: int, folder: Path) -> dict:
  """One run with up to `limit` disturbances: the injected faults, their cost, and any differences."""
  fault = kinds.named(name)(random.Random(seed))
  expected = undisturbed(fault, folder)
  workdir, lost, problems, injected, attempt = folder / 'run', [], [], 0, 0
  while not problems:
    attempt += 1
    disturbs = injected < min(limit, fault.per_run)
    before = _last_step(workdir)
    processes = Processes(workdir, folder / f'{attempt}', fault.steps,
                          fault.faults(before) if disturbs else fault.lasting, fault.count)
    disturbed = disturbs and fault.disturb(processes)
    codes = processes.finish(_HANGS)
    if attempt > 1:
      went_on = kinds.resumed_at(processes.output())
      lost += [] if went_on is None else [before - went_on]
      problems += filter(None, [fault.went_on_well(processes)])
    if codes is None:
      problems.append('a process hangs')
    elif disturbed:
      injected += 1
      problems += filter(None, [fault.ended_well(processes, codes)])
    if codes == [0] * fault.count:
      break
    if codes is not None and not disturbed:
      problems.append(f'exit codes {codes}, undisturbed')
  rows = _rows(workdir)
  batches = len(fault.lasting.not_finite | fault.lasting.spikes)
  if batches:  # These are the injected faults; steps lost by rollbacks are counted by the run.
    lost = [rows[-1]['recovery/lost'] if rows else 0]
    if not rows or rows[-1]['recovery/skipped'] < batches:
      problems.append(f'{rows[-1]["recovery/skipped"] if rows else 0} of {batches} batches were skipped')
  identical = rows == expected
  if identical and not problems:
    shutil.rmtree(folder)
  return dict(kind=name, seed=seed, injected=batches or injected, kills=injected if batches else None, lost=lost,
              identical=identical, problems=problems)


def undisturbed(fault: kinds.Kind, folder: Path) -> list[dict]:
  """The rows of a run with only the lasting faults."""
  key = (str(sorted(fault.lasting.not_finite)), str(sorted(fault.lasting.spikes)), fault.count)
  if key not in _undisturbed:
    workdir = folder / 'undisturbed'
    processes = Processes(workdir, folder / 'undisturbed.log', fault.steps, fault.lasting, fault.count)
    codes = processes.finish(10 * _HANGS)
    if codes != [0] * fault.count:
      raise RuntimeError(f'The undisturbed run ended with {codes}:\n{processes.output()[-2000:]}')
    _undisturbed[key] = _rows(workdir)
  return _undisturbed[key]


_undisturbed: dict[tuple, list[dict]] = {}


def _rows(workdir):
  """The rows of metrics without timings."""
  return [metrics.repeatable(row) for row in metrics.read(workdir)]


def _last_step(workdir):
  rows = metrics.read(workdir)
  return rows[-1]['step'] if rows else 0


def main(argv) -> None:
  del argv
  options = flags.FLAGS
  path = Path(options.out)
  results = json.loads(path.read_text()) if path.exists() else dict(
      command=f'python -m experiments.faults.sweep --kills={options.kills} --seed={options.seed}', runs=[])
  scratch = runner.ROOT / 'runs/faults'
  jax.config.update('jax_compilation_cache_dir', str(scratch / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  for name, quota in quotas(options.kills, options.kinds).items():
    while (done := sum(run['injected'] for run in results['runs'] if run['kind'] == name)) < quota:
      index = sum(run['kind'] == name for run in results['runs'])
      folder = scratch / f'{options.seed}-{name}-{index}'
      shutil.rmtree(folder, ignore_errors=True)
      began = time.monotonic()
      found = run(name, f'{options.seed}-{name}-{index}', quota - done, folder)
      results['runs'].append(dict(found, **runner.environment()))
      path.write_text(json.dumps(results, indent=1) + '\n')
      wrong = f': {"; ".join(found["problems"])}' if found['problems'] else ''
      print(f'{name} {done + found["injected"]} of {quota}: {time.monotonic() - began:.0f} s, '
            f'{"identical" if found["identical"] else "DIFFERENT"}{wrong}', flush=True)
  print(report.table(results))
  print(f'Results: {path}. Failed runs are kept in {scratch}. Next: python -m experiments.tables')
  failed = [run for run in results['runs'] if run['problems'] or not run['identical']]
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  flags.DEFINE_integer('kills', 200, 'Processes to kill; other faults in proportion.')
  flags.DEFINE_list('kinds', [], 'Only these kinds.')
  flags.DEFINE_integer('seed', 0, 'Seed of the random moments.')
  flags.DEFINE_string('out', str(RESULTS), 'Results file, from which an interrupted sweep resumes.')
  app.run(main)
