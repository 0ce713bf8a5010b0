"""Measures dispatchers on this machine's CPU against a dense floor and the installed peers.

    python -m experiments.dispatch_benchmark.cpu            about 15 minutes; the machine should be idle
    python -m experiments.dispatch_benchmark.cpu --quick    tiny shapes: does everything run?

Writes cpu.json and figure.png in this folder (with --quick in runs/dispatch_benchmark) and prints the tables of the
README. Measuring a case again replaces its results.
"""
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from absl import app, flags
from tqdm import tqdm

from experiments import runner
from experiments.dispatch_benchmark import peers, plot, programs, report

FOLDER = pathlib.Path(__file__).parent
COMMAND = 'python -m experiments.dispatch_benchmark.cpu'
QUICK = flags.DEFINE_bool('quick', False, 'Tiny shapes and two rounds.')
CASES = flags.DEFINE_list('cases', list(programs.cases(programs.FULL)), 'Cases to measure.')
TORCH_PYTHON = flags.DEFINE_string('torch_python', sys.executable, 'Python interpreter with torch and transformers.')
OUTPUT = flags.DEFINE_string('output', None, 'Folder of the results, instead of the default.')


def commands(torch_python: str) -> dict[str, list[str]]:
  """The command of each process; prints one sentence for each missing peer."""
  ours = [sys.executable, '-m', 'experiments.dispatch_benchmark.layer']
  found = dict(moejax=ours, ragged_dot=ours)
  if importlib.util.find_spec('tokamax'):
    found['tokamax'] = ours
  else:
    print('tokamax is not measured: it is not installed (`pip install tokamax`, Python 3.12).')
  if subprocess.run([torch_python, '-c', 'import torch, transformers'], capture_output=True).returncode == 0:
    found['torch'] = [torch_python, '-m', 'experiments.dispatch_benchmark.torch_peer']
  else:
    print(f'transformers is not measured: {torch_python} lacks it or torch; set --torch_python to another interpreter.')
  return found


def measure(name: str, case: programs.Case, commands: dict[str, list[str]]) -> dict:
  """Prepares all programs of a case and times them in rounds; skips peers without a command."""
  load = [os.getloadavg()[0]]
  with contextlib.ExitStack() as stack:
    processes = {peer: stack.enter_context(peers.Peer(commands[peer])) for peer in case.programs if peer in commands}
    waiting = [(peer, program) for peer in processes for program in case.programs[peer]]
    measured = {peer: {} for peer in processes}
    for peer, program in tqdm(waiting, f'{name}: compile'):
      measured[peer][program.key] = dict(processes[peer].prepare(program), seconds=[])
    for number in tqdm(range(case.rounds), f'{name}: rounds'):
      for peer, process in processes.items():
        for key, seconds in process.round(number).items():
          measured[peer][key]['seconds'].append(seconds)
    load.append(os.getloadavg()[0])
    return dict(rounds=case.rounds, environment=runner.environment(), load_average=load,
                peers={peer: dict(versions=process.versions, programs=measured[peer])
                       for peer, process in processes.items()})


def run(size: programs.Size, names: list[str], commands: dict[str, list[str]], folder: pathlib.Path) -> dict:
  """Measures the cases `names`, writes cpu.json after each and figure.png at the end; returns all results."""
  path = folder / 'cpu.json'
  folder.mkdir(parents=True, exist_ok=True)
  results = json.loads(path.read_text()) if path.exists() else {}
  shape = json.loads(json.dumps(dataclasses.asdict(size)))
  if results.get('size') != shape:
    results = dict(command=COMMAND, size=shape, seed=0, cases={})
  cases = programs.cases(size)
  for name in names:
    results['cases'][name] = measure(name, cases[name], commands)
    path.write_text(json.dumps(results, indent=1) + '\n')
  plot.save(results, folder)
  return results


def main(_) -> None:
  """Measures the cases given by the flags."""
  if unknown := set(CASES.value) - set(known := programs.cases(programs.FULL)):
    raise app.UsageError(f'--cases: unknown {", ".join(unknown)}. Allowed: {", ".join(known)}.')
  default = runner.ROOT / 'runs/dispatch_benchmark' if QUICK.value else FOLDER
  folder = pathlib.Path(OUTPUT.value or default)
  size = programs.QUICK if QUICK.value else programs.FULL
  results = run(size, CASES.value, commands(TORCH_PYTHON.value), folder)
  print(report.table(results))
  print(f'\nResults: {folder}/cpu.json and figure.png. Next: python -m experiments.tables (fills README and docs).')


if __name__ == '__main__':
  app.run(main)
