"""Does what papers report show at the size of minutes? Every file of this folder with an `EFFECT` is asked."""
import importlib
import pathlib
from collections.abc import Iterator

from experiments.paper_effects.effect import Effect, EffectRun

FOLDER = pathlib.Path(__file__).parent


def effects() -> dict[str, Effect]:
  """`{file: effect}`; a file may have several, as `EFFECTS` by name."""
  found = {}
  for path in sorted(FOLDER.glob('[!_]*.py')):
    module = importlib.import_module(f'experiments.paper_effects.{path.stem}')
    if hasattr(module, 'EFFECT'):
      found[path.stem] = module.EFFECT
    found |= {f'{path.stem}_{name}': effect for name, effect in getattr(module, 'EFFECTS', {}).items()}
  return found


def sweep() -> Iterator[EffectRun]:
  for name, effect in effects().items():
    yield from effect.runs(name)
