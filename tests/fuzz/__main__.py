"""Tries mutants of all configs: `python -m tests.fuzz --seed=0 --size=1000`.

Each is prepared and its training step traced, in a worker with a limit of 20 s of CPU time and 4 GB. What came of each
is a line of <out>/<seed>.jsonl; the same command resumes after the last one. `--jobs` workers run side by side.
`--run=100` then trains that many of the accepted ones for two steps with an evaluation. At the end <out>/results.json
and results.md count what came of all seeds there are.
"""
import argparse
import collections
import json
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

SMALL = re.compile('_(chitchat|digits|domains|emoji)')
FAULTS = ('unclear', 'traceback', 'hang', 'memory', 'died', 'late')
PATIENCE = 300  # seconds on the clock until a worker that says nothing is ended; its own limit is of CPU time


class Worker:
  """A process that tries ('attempt') or trains ('train') mutants; started again when it dies."""

  def __init__(self, seed: int, what: str):
    self._command = [sys.executable, '-m', 'tests.fuzz.worker', str(seed), what]
    self._process = None

  def attempt(self, number: int) -> dict:
    """What came of a mutant."""
    if self._process is None:
      self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
      self._process.stdout.readline()
    timer = threading.Timer(PATIENCE, self._process.kill)
    timer.start()
    try:
      print(number, file=self._process.stdin, flush=True)
      answer = self._process.stdout.readline()
    except BrokenPipeError:
      answer = ''
    finally:
      late = not timer.is_alive()
      timer.cancel()
    if answer:
      return json.loads(answer)
    self._process.kill()
    code, self._process = self._process.wait(), None
    return dict(number=number, config='', changes=[], kinds=[], verdict='hang' if late else 'died', seconds=0.,
                message=f'the process ended with {code}', place='')

  def close(self) -> None:
    if self._process is not None:
      self._process.stdin.close()
      self._process.wait()


def fuzz(seed: int, what: str, numbers: Iterable[int], jobs: int, path: pathlib.Path) -> None:
  """Tries those mutants of a seed of which `path` does not say yet what came."""
  tried = {line['number'] for line in read(path)}
  left = [number for number in numbers if number not in tried]
  numbers, counts, start = queue.Queue(), collections.Counter(), time.time()
  for number in left:
    numbers.put(number)
  lock = threading.Lock()

  def work():
    worker = Worker(seed, what)
    while True:
      try:
        number = numbers.get_nowait()
      except queue.Empty:
        return worker.close()
      said = worker.attempt(number)
      with lock, path.open('a') as file:
        file.write(json.dumps(said) + '\n')
        counts[said['verdict']] += 1
        done = counts.total()
        if said['verdict'] in FAULTS:
          print(f'{said["verdict"]}: {said["config"]}: {"; ".join(said["changes"])}: {said["place"]} {said["message"]}',
                flush=True)
        if done % 100 == 0 or done == len(left):
          rate = done / (time.time() - start)
          print(f'{done} of {len(left)}: {dict(counts)}, {rate:.1f}/s, {(len(left) - done) / rate / 60:.0f} min to go',
                flush=True)

  threads = [threading.Thread(target=work) for _ in range(jobs)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def read(path: pathlib.Path) -> list[dict]:
  """What came of the mutants in a file; nothing where there is none."""
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def to_run(lines: list[dict], count: int) -> list[int]:
  """Numbers of accepted mutants, spread evenly, of configs whose models and data are small and here."""
  small = [line['number'] for line in lines if line['verdict'] == 'accepted' and SMALL.search(line['config'])]
  return small[::max(1, len(small) // count)][:count] if count else []


def summary(lines: list[dict]) -> dict:
  """Counts by config and by kind of change, the slowest, and all faults."""
  def count(of):
    table = collections.defaultdict(collections.Counter)
    for line in lines:
      for group in of(line):
        table[group]['faults' if line['verdict'] in FAULTS else line['verdict']] += 1
    return {group: dict(sorted(table[group].items())) for group in sorted(table)}

  slowest = sorted(lines, key=lambda line: -line['seconds'])[:10]
  return dict(mutants=len(lines), verdicts=dict(collections.Counter(line['verdict'] for line in lines)),
              by_kind=count(lambda line: set(line['kinds'])),
              by_config=count(lambda line: [line['config'].split(':')[0]]), slowest=[pick(line) for line in slowest],
              faults=[pick(line) for line in lines if line['verdict'] in FAULTS])


def pick(line: dict) -> dict:
  """What is told of one mutant."""
  return {key: line[key] for key in ('config', 'changes', 'verdict', 'seconds', 'message', 'place')}


def markdown(found: dict) -> str:
  """The summary as a page."""
  def table(title, groups):
    columns = ('accepted', 'refused', 'faults')
    rows = [f'| {group} | ' + ' | '.join(str(counts.get(column, 0)) for column in columns) + ' |'
            for group, counts in groups.items()]
    return [f'| {title} | {" | ".join(columns)} |', '|---|---|---|---|', *rows, '']

  verdicts = ', '.join(f'{count} {verdict}' for verdict, count in sorted(found['verdicts'].items()))
  slowest = [f'- {line["seconds"]:.1f} s, {line["verdict"]}: {line["config"]}: `{"; ".join(line["changes"])}`'
             for line in found['slowest']]
  return '\n'.join([f'# {found["mutants"]} mutated configs: {verdicts}', '', *table('kind of change', found['by_kind']),
                    *table('config', found['by_config']),
                    f'Trained for two steps with an evaluation: {found["trained"]}.', '', 'Slowest:', '', *slowest, ''])


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--size', type=int, default=1000, help='mutants of the seed')
  parser.add_argument('--jobs', type=int, default=1)
  parser.add_argument('--run', type=int, default=0, help='of the accepted ones to train')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/fuzz'))
  flags = parser.parse_args()
  flags.out.mkdir(parents=True, exist_ok=True)
  tried = flags.out / f'{flags.seed}.jsonl'
  fuzz(flags.seed, 'attempt', range(flags.size), flags.jobs, tried)
  fuzz(flags.seed, 'train', to_run(read(tried), flags.run), flags.jobs, flags.out / f'{flags.seed}.trained.jsonl')
  every = lambda pattern: [line for path in sorted(flags.out.glob(pattern)) for line in read(path)]
  found = summary(every('*[0-9].jsonl'))
  trained = every('*.trained.jsonl')
  found['trained'] = dict(collections.Counter(line['verdict'] for line in trained))
  found['faults'] += [pick(line) for line in trained if line['verdict'] in FAULTS]
  (flags.out / 'results.json').write_text(json.dumps(found, indent=1) + '\n')
  (flags.out / 'results.md').write_text(markdown(found))
  print(f'Written: {flags.out / "results.md"}')


if __name__ == '__main__':
  main()
