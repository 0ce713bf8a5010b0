"""Plans a run before there are chips: `python -m moejax.compile --config=configs/x.py --topology=v5e:16x16`.

Compiles the real training step for the topology, on any machine with Linux and the extra `compile`, and says what it
takes: parameters, memory of a chip, FLOPs, memory traffic, collectives, an estimate of time and MFU, and the first
thing to change if it does not fit. Topologies: v4, v5e, v5p, v6e with the sides of a torus (v5e:16x16, v5p:4x4x8), h100
with hosts x GPUs (h100:8x8). Keys of the config are set as for moejax.train, `--config.mesh.expert=8`.
`--out=plans/mixtral` also writes plan.json. From Python: `moejax.compile.run(config, 'v5e:16x16')`.

Exit codes: 0 it fits; 1 it does not; 2 something is wrong with the command or the config.
"""
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Programs are made here and run elsewhere; chips at hand stay free for others.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app, flags, logging
from ml_collections import config_flags

from moejax.config import ConfigError
from moejax.parallel import ahead_of_time, plan_text, topologies
from moejax.parallel.ahead_of_time import Plan
from moejax.training.setup import prepare

__all__ = ['run']

_USAGE = 'python -m moejax.compile --config=configs/<file>.py --topology=v5e:16x16'
_TICK = 15  # seconds between signs of life


def run(config: Mapping, topology: str, out: str | Path | None = None, say: Callable[[str], None] = print) -> Plan:
  """Compiles the training step of `config` for `topology`, says what it takes, and writes `<out>/plan.json`.

  Raises:
    ConfigError: before anything is compiled: no such topology, its compiler is missing, or a config that is wrong or
      does not divide over it.
  """
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
  """Says what is being done and for how long, in lines that begin with the seconds since the start."""

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


if __name__ == '__main__':
  from moejax.train import checked, in_one_sentence, parse_flags

  config_flag = config_flags.DEFINE_config_file('config', None, 'Config file, with an argument after a colon.')
  topology_flag = flags.DEFINE_string('topology', None, 'Machine to compile for, e.g. v5e:16x16 or h100:8x8.')
  out_flag = flags.DEFINE_string('out', None, 'Folder for plan.json; made if missing.')

  def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise ConfigError(f'{argv[1]!r} is no flag: {_USAGE} --config.<key>=<value>.')
    if not topology_flag.value or config_flag.value is None:
      raise ConfigError(f'--config and --topology are needed: {_USAGE}.')
    logging.set_verbosity(logging.ERROR)
    say = lambda line: print(line, flush=True)
    found = run(checked(config_flag.value), topology_flag.value, out_flag.value, say)
    sys.exit(0 if found.memory.fits else 1)

  in_one_sentence(lambda: app.run(main, flags_parser=parse_flags))
