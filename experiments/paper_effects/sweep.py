"""Does what papers report show at the size of minutes? Every file of this folder with an `EFFECT` is asked."""
import dataclasses
import importlib
import pathlib
from collections.abc import Iterator

from experiments.paper_effects.effect import Effect, EffectRun

FOLDER = pathlib.Path(__file__).parent


def effects() -> dict[str, Effect]:
  """`{file: effect}`; a file may have further ones, as `EFFECTS` by name: `{file/name: effect}`."""
  found = {}
  for path in sorted(FOLDER.glob('[!_]*.py')):
    module = importlib.import_module(f'experiments.paper_effects.{path.stem}')
    if hasattr(module, 'EFFECT'):
      found[path.stem] = module.EFFECT
    found |= {f'{path.stem}/{name}': effect for name, effect in getattr(module, 'EFFECTS', {}).items()}
  return found


def sweep() -> Iterator[EffectRun]:
  """Every run once, with what all effects want of it.

  Raises:
    ValueError: effects of one file have runs of one name that differ.
  """
  found: dict[str, EffectRun] = {}
  for name, effect in effects().items():
    for run in effect.runs(name):
      same = found.setdefault(run.key, run)
      found[run.key] = dataclasses.replace(same, wanted={**same.wanted, **run.wanted})
      if run.command(FOLDER) != same.command(FOLDER):
        raise ValueError(f'{run.key}: effects of one file that share a variant must run it in the same way.')
  yield from found.values()
