"""Plans a run before there are chips: compiles its real training step for a topology, on any Linux machine.

    python -m moejax.plan --config=configs/mixtral_c4.py:8x7b --topology=v5p:4x8x8
    python -m moejax.plan --config=configs/vmoe_digits.py --topology=v5e:2x2 --config.mesh.expert=4
    python -m moejax.plan --config=configs/switch_c4.py:base --topology=h100:8x8 --out=plans/switch

Prints what the step takes: parameters, memory per chip, FLOPs, memory traffic, collectives, an estimate of time and
MFU, and the first thing to change if it does not fit. Topologies: v4, v5e, v5p, v6e with the sides of a torus
(v5e:16x16, v5p:4x4x8), h100 with hosts x GPUs (h100:8x8). Needs the extra `compile`. `--out` also writes plan.json.
From Python: `moejax.plan.run(config, 'v5e:16x16')`.

Exit codes: 0 it fits; 1 it does not; 2 the command or the config is wrong.
"""
from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

# Programs are compiled here and run elsewhere; local chips stay free for others.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from moejax import command_line, config_files

if TYPE_CHECKING:
  from moejax.planning.ahead_of_time import PodPlan

_TICK = 15  # seconds between progress lines


def run(config: Mapping | ConfigDict, topology: str, out: str | Path | None = None,
        say: Callable[[str], None] = print) -> PodPlan:
  """Compiles the training step of `config` for `topology`, prints what it takes, and writes `<out>/plan.json`.

  Raises:
    ConfigError: before anything is compiled: an unknown topology, a missing compiler, or a config that is wrong or
      does not divide over the topology.
  """
  from moejax.planning import ahead_of_time, plan_text, topologies
  from moejax.training.setup import prepare
  start = time.perf_counter()
  stage = Stages(start, say)
  with stage(f'describing {topology}'):
    machine = topologies.load(topology)
  with stage('building the model and checking the config'):
    setup = prepare(config, machine.devices)
  found = ahead_of_time.plan(setup, machine, stage)
  say('')
  say(plan_text.write(found))
  if out is not None:
    path = Path(out) / 'plan.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ahead_of_time.as_dict(found), indent=1) + '\n')
    say(f'\nWritten: {path}')
  return found


class Stages:
  """Prints each stage and its duration so far, in lines that begin with the seconds since the start."""

  def __init__(self, start: float, say: Callable[[str], None]):
    self._start, self._say = start, say

  @contextlib.contextmanager
  def __call__(self, name: str):
    self._line(name)
    began, done = time.perf_counter(), threading.Event()

    def tick():
      while not done.wait(_TICK):
        self._line(f'... still {name}, for {time.perf_counter() - began:.0f} s')

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
      yield
    finally:
      done.set()
      ticker.join()

  def _line(self, text):
    self._say(f'{time.perf_counter() - self._start:6.0f} s  {text}')


def main() -> int:
  """The command."""
  flags = command_line.Parser('moejax.plan', __doc__, keys='config')
  flags.add_config()
  flags.add_argument('--topology', help='machine to compile for, e.g. v5e:16x16 or h100:8x8')
  flags.add_argument('--out', metavar='FOLDER', help='where to write plan.json; created if missing')
  given = flags.parse(needs=('config', 'topology'))
  config = config_files.load(given.config, given.overrides)
  found = run(config, given.topology, given.out, lambda line: print(line, flush=True))
  return 0 if found.memory.fits else 1


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
