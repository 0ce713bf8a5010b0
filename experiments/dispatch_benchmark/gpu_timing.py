"""A process of the GPU benchmark: reads a job, times programs in rounds, and writes the results.

Plain Python, because PyTorch's process uses it too. Programs of a process take turns, in a new random order each round,
so that a GPU that slows down affects them all. Every process also times the dense floor, for comparison by ratios.
"""
import json
import math
import pathlib
import random
import sys
import time
from collections.abc import Callable

LEAST_SECONDS = 0.02  # seconds per timing of many runs: a single launch would mostly measure Python
Run = Callable[[int], None]  # runs a program that many times, and waits for it


def measure(runs: dict[str, Run], rounds: int,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
  """Seconds per call of each program, in each round."""
  def seconds(run, calls):
    start = clock()
    run(calls)
    return (clock() - start) / calls

  calls = {}
  for name, run in runs.items():
    run(2)
    calls[name] = max(1, math.ceil(LEAST_SECONDS / seconds(run, 1)))
  measured = {name: [] for name in runs}
  for number in range(rounds):
    order = sorted(runs)
    random.Random(number).shuffle(order)
    for name in order:
      measured[name].append(seconds(runs[name], calls[name]))
  return measured


def serve(build: Callable[[dict, str], tuple[dict[str, Run], dict[str, str], dict]], versions: dict[str, str]) -> None:
  """Runs the job in the file given by the first command line argument, and writes the answer to the second.

  Args:
    build: `(shape, load) -> (programs, errors, facts)`: programs by name, reasons for missing ones, other facts.
    versions: versions of the relevant packages, and the device.
  """
  job = json.loads(pathlib.Path(sys.argv[1]).read_text())
  loads = {}
  for load in job['loads']:
    runs, errors, facts = build(job['shape'], load)
    loads[load] = dict(seconds=measure(runs, job['rounds']), errors=errors, facts=facts)
  pathlib.Path(sys.argv[2]).write_text(json.dumps(dict(versions=versions, loads=loads)))
