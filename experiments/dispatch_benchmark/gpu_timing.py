"""What a process of the GPU benchmark does: it gets a job, times programs in rounds, and writes down what came out.

Plain Python, for PyTorch's process too. Programs of one process take turns, in an order drawn anew each round, so that
a GPU that slows down does so for all. Every process times the dense floor as well: processes are compared by ratios.
"""
import json
import math
import pathlib
import random
import sys
import time
from collections.abc import Callable

LEAST_SECONDS = 0.02  # of a timing, in which a program may run many times: one launch would mostly measure Python
Run = Callable[[int], None]  # runs a program that many times, and waits for it


def measure(runs: dict[str, Run], rounds: int,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
  """Seconds that one call of each program takes, in each round."""
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
  """Does the job in the file that the command line names first, and writes the answer to the one that it names second.

  Args:
    build: `(shape, load) -> (programs, errors, facts)`: programs by name, why others are not there, what else there is
      to know.
    versions: of the packages that matter, and the device.
  """
  job = json.loads(pathlib.Path(sys.argv[1]).read_text())
  loads = {}
  for load in job['loads']:
    runs, errors, facts = build(job['shape'], load)
    loads[load] = dict(seconds=measure(runs, job['rounds']), errors=errors, facts=facts)
  pathlib.Path(sys.argv[2]).write_text(json.dumps(dict(versions=versions, loads=loads)))
