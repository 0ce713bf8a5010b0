"""One process per peer: the benchmark writes requests to its standard input, and it answers with lines of JSON.

    {"prepare": {Program}}  compile and run once        -> facts about it, e.g. its memory
    {"round": n}            run each program once       -> {key of the program: seconds}

Only one process runs at a time; rounds are interleaved between processes, and between the programs of a process.
"""
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from experiments.dispatch_benchmark.programs import Program

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Peer:
  """The benchmark's end; a context manager that ends the process."""

  def __init__(self, command: list[str]):
    """Starts `command`, a process that calls `serve`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                     env={**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'})
    self._command = ' '.join(command)
    self.versions = self._answer()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def prepare(self, program: Program) -> dict:
    """Compiles and warms up; returns facts about it. Raises RuntimeError with the peer's traceback on failure."""
    return self._ask(prepare=dataclasses.asdict(program))

  def round(self, number: int) -> dict[str, float]:
    """Seconds of each prepared program, by its key. They run in a random order with seed `number`."""
    return self._ask(round=number)

  def _ask(self, **request):
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    answer = json.loads(line) if line else dict(error=f'it ended with status {self._process.wait()}')
    if 'error' in answer:
      raise RuntimeError(f'The peer `{self._command}` failed: {answer["error"]}')
    return answer


def serve(build: Callable[[Program], tuple[Callable[[], object], dict]], versions: dict[str, str]) -> None:
  """The peer's end; serves until its input ends.

  Args:
    build: a program -> a function that runs it and returns its outputs once they are ready, and facts about it.
    versions: versions of the relevant packages.
  """
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # output of libraries goes to stderr
  answers.write(json.dumps(versions) + '\n')
  runs = {}
  for line in sys.stdin:
    request = json.loads(line)
    try:
      if 'prepare' in request:
        program = Program(**request['prepare'])
        runs[program.key], answer = build(program)
        runs[program.key]()
      else:
        order = sorted(runs)
        random.Random(request['round']).shuffle(order)
        answer = {key: _seconds(runs[key]) for key in order}
    except Exception:
      answer = dict(error=traceback.format_exc())
    answers.write(json.dumps(answer) + '\n')


def _seconds(run):
  start = time.perf_counter()
  outputs = run()
  seconds = time.perf_counter() - start
  del outputs  # freeing memory is not the program's work
  return round(seconds, 7)
