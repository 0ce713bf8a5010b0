"""`python -m experiments.paper_effects [name ...]`: runs what all effects, or those named, still lack; judges.

Results go to results.json, verdicts to summary.json, of which `python -m moejax.systems --write` makes docs/systems.md.
Interrupt it at any time; the same command goes on.
"""
import os
import sys

from experiments import runner
from experiments.paper_effects import effect, sweep
from experiments.paper_effects.claims import CLAIMS


def main(names: list[str]) -> None:
  """Runs, judges, prints."""
  if unknown := [name for name in names if name not in CLAIMS]:
    sys.exit(f'There is no effect {", ".join(unknown)}. There are: {", ".join(CLAIMS)}.')
  # Seeds of a variant are the same program: a third of a run is its compilation.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(runner.ROOT / 'runs/compiled'))
  failed = runner.main('paper_effects', tuple(f'{name.partition("/")[0]}.' for name in names))
  found = effect.summary(CLAIMS, runner.load('paper_effects'))
  path = sweep.FOLDER / 'summary.json'
  effect.write(path, found)
  for name in names or CLAIMS:
    print(f'{name}: ' + (f'{found[name]["verdict"]}. {found[name]["claim"]}' if name in found else 'not measured yet.'))
  print(f'Verdicts: {path.relative_to(runner.ROOT)}. Next: python -m moejax.systems --write (fills docs/systems.md)')
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  main(sys.argv[1:])
