"""Builds the configs of a study in a process of its own, which ends before the first run needs the devices.

`check` is for the runner; `python -m experiments.checks FOLDER OUT KEY...` is the process: it writes OUT, a JSON file.
"""
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from experiments import runner
from moejax import command_line
from moejax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one run at a time can be: on some cores, or on one device.

  Attributes:
    cores: None: all there are.
    environment: variables of its process.
  """
  cores: frozenset[int] | None = None
  environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Machine:
  """What jax found: 'cpu', 'gpu' or 'tpu'; the kind of its devices, and their number."""
  platform: str
  kind: str
  devices: int

  def places(self, jobs: int | None, runs: int) -> list[Place]:
    """For `jobs` runs at a time of `runs` in all; None: as many as can be.

    A CPU's cores are shared out: runs of one study have the same number, give or take one, so that their times compare.

    Raises:
      ConfigError: so many cannot run at a time.
    """
    if self.platform == 'gpu':
      visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(self.devices)))
      places = [Place(environment={'CUDA_VISIBLE_DEVICES': device}) for device in visible.split(',')]
    elif self.platform == 'cpu':
      places = [Place(frozenset([core])) for core in sorted(_cores())]
    else:
      places = [Place()]
    if jobs is not None and not 1 <= jobs <= len(places):
      raise ConfigError(f'--jobs={jobs} must be from 1 to {len(places)}: a run has a core of a CPU or a GPU for '
                        'itself, or all of a TPU.')
    count = min(jobs or len(places), runs)
    if self.platform != 'cpu':
      return places[:count]
    return [Place(frozenset().union(*(place.cores for place in places[i::count]))) for i in range(count)]


def check(study: runner.Study, runs: list[runner.Run]) -> Machine:
  """Builds every config of `runs`, of seeds of one variant the first one's.

  Raises:
    ConfigError: what is wrong with each that could not train.
  """
  different = {}
  for run in runs:
    different.setdefault((run.name, run.config, str(run.overrides)), run.key)
  print(f'Checking {len(different)} variants ...', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, 'checked.json')
    subprocess.run([sys.executable, '-m', 'experiments.checks', str(study.folder), str(out), *different.values()],
                   cwd=runner.ROOT)
    if not out.exists():
      raise ConfigError('The configs could not be checked, for the reason above. Nothing was run.')
    found = json.loads(out.read_text())
  if wrong := found['wrong']:
    names = {run.key: run.name for run in runs}
    sentences = '\n'.join(f'  {names[key]}: {message}' for key, message in wrong.items())
    raise ConfigError(f'{len(wrong)} of {len(different)} variants cannot run:\n{sentences}\nNothing was run.')
  return Machine(**found['machine'])


def _cores() -> set[int]:
  return os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else set(range(os.cpu_count()))


def main() -> None:
  """The process."""
  folder, out, *keys = sys.argv[1:]
  import jax
  devices = jax.local_devices()
  # A run sees one GPU only.
  of_a_run = devices[:1] if devices[0].platform == 'gpu' else jax.devices()
  wrong = {}
  for run in runner.find(folder).runs:
    if run.key in keys:
      try:
        run.check(of_a_run)
      except ConfigError as error:
        wrong[run.key] = str(error)
  machine = dict(platform=devices[0].platform, kind=devices[0].device_kind, devices=len(devices))
  pathlib.Path(out).write_text(json.dumps(dict(machine=machine, wrong=wrong)))


if __name__ == '__main__':
  command_line.in_one_sentence(main)
