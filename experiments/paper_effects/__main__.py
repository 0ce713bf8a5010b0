"""Runs what all effects, or those named, still lack; judges.

    python -m experiments.paper_effects [name ...] [--jobs=1]

Results go to results.json, verdicts to summary.json, of which `python -m moejax.systems --write` makes docs/systems.md.
Interrupt it at any time: the same command resumes. Exit codes: those of `experiments.runner`.
"""
import os

from experiments import runner
from experiments.paper_effects import effect, sweep
from experiments.paper_effects.claims import CLAIMS
from moejax import command_line
from moejax.config import ConfigError, nearest


def main() -> int:
  """Runs, judges, prints."""
  flags = command_line.Parser('experiments.paper_effects', __doc__, usage='[name ...] [flags]')
  flags.add_argument('names', metavar='name', nargs='*', help='of a claim; all of them by default')
  flags.add_argument('--jobs', metavar='N', type=int, help='runs at a time; by default as many as cores or GPUs')
  given = flags.parse()
  if unknown := [name for name in given.names if name not in CLAIMS]:
    raise ConfigError(f'There is no effect {", ".join(unknown)}. {nearest(unknown[0], CLAIMS)}')
  # Seeds of a variant are the same program: a third of a run is its compilation.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(runner.ROOT / 'runs/compiled'))
  failed = runner.main('paper_effects', tuple(f'{name.partition("/")[0]}.' for name in given.names), given.jobs)
  found = effect.summary(CLAIMS, runner.load('paper_effects'))
  path = sweep.FOLDER / 'summary.json'
  effect.write(path, found)
  for name in given.names or CLAIMS:
    print(f'{name}: ' + (f'{found[name]["verdict"]}. {found[name]["claim"]}' if name in found else 'not measured yet.'))
  print(f'Verdicts: {path.relative_to(runner.ROOT)}. Next: python -m moejax.systems --write (fills docs/systems.md)')
  return 1 if failed else 0


if __name__ == '__main__':
  command_line.in_one_sentence(main)
