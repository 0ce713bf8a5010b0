"""Does what papers report show at the size of minutes? Every claim of `claims.CLAIMS` is asked."""
import dataclasses
import pathlib
from collections.abc import Iterator

from experiments.paper_effects.claims import CLAIMS
from experiments.paper_effects.effect import EffectRun

FOLDER = pathlib.Path(__file__).parent


def sweep() -> Iterator[EffectRun]:
  """Every run once, with what all effects want of it.

  Raises:
    ValueError: claims whose names agree before the slash have runs of one name that differ.
  """
  found: dict[str, EffectRun] = {}
  for name, effect in CLAIMS.items():
    for run in effect.runs(name):
      same = found.setdefault(run.key, run)
      found[run.key] = dataclasses.replace(same, wanted={**same.wanted, **run.wanted})
      if run.command(FOLDER) != same.command(FOLDER):
        raise ValueError(f'{run.key}: claims that share a variant must run it in the same way.')
  yield from found.values()
