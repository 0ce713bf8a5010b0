"""Memory and time of large models on pods they fit: `moejax.plan` for each, on a machine without accelerators.

Takes minutes and some GB of memory per model, on one core; the table is in docs/scaling.md.
"""
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

from experiments.runner import Run
from moejax import config_files


@dataclasses.dataclass(frozen=True)
class Planned(Run):
  """A training step that is compiled but not run.

  Attributes:
    topology: the value of `--topology`.
  """
  seed: int = 0
  topology: str = ''

  @property
  def key(self) -> str:
    """Includes the topology, since one model may be planned for several."""
    return re.sub(r'\W+', '_', f'{self.name} {self.topology}'.lower())

  def command(self, workdir: pathlib.Path) -> list[str]:
    """The command for the plan."""
    flags = [f'--config.{key}={value}' for key, value in self.overrides.items()]
    return ['python', '-m', 'moejax.plan', f'--config={self.config}', f'--topology={self.topology}',
            f'--out={workdir}', *flags]

  def check(self, devices: list) -> None:
    """That its config exists; the command checks it for the devices of its topology."""
    config_files.load(self.config, self.overrides)

  def metrics(self, workdir: pathlib.Path) -> dict:
    """The plan, with collectives summed by kind."""
    plan = json.loads((workdir / 'plan.json').read_text())
    if plan['program']:
      kinds = {}
      for row in plan['program'].pop('collectives'):
        runs, size = kinds.get(row['kind'], (0, 0))
        kinds[row['kind']] = (runs + row['runs'], size + row['bytes'])
      plan['program']['collectives'] = {kind: dict(runs=runs, bytes=size) for kind, (runs, size) in kinds.items()}
    return plan


def sweep() -> Iterator[Planned]:
  """Models of the papers, each with a mesh that fits."""
  def row(name, config, topology, **overrides):
    keys = {key.replace('__', '.'): value for key, value in overrides.items()}
    return Planned(name, f'configs/{config}', overrides=keys, topology=topology)

  yield row('V-MoE-15B/14', 'vmoe_imagenet21k.py:15B/14,every-2', 'v5e:16x16',
            mesh__expert=32, mesh__fsdp=8, mesh__data=1)
  yield row('Switch-Base/128', 'switch_c4.py:base', 'v5e:16x16', mesh__expert=128, mesh__data=2)
  yield row('Switch-C', 'switch_c4.py:c', 'v5p:8x8x8', mesh__expert=512, mesh__data=1)
  yield row('ST-MoE-32B', 'st_moe_c4.py:32b', 'v6e:16x16', mesh__expert=64, mesh__fsdp=4, mesh__data=1)
  yield row('Mixtral 8x7B', 'mixtral_c4.py:8x7b', 'v5p:4x8x8', training__accumulate=4)
  yield row('Mixtral 8x7B', 'mixtral_c4.py:8x7b', 'h100:8x8', training__accumulate=16)
  yield row('fine-grained 16B', 'fine_grained_c4.py:16b', 'h100:8x8', training__accumulate=18)
