"""BASE: what the balanced assignment prevents."""
import json
import pathlib

from experiments.paper_effects.effect import Effect


def heaviest_load(workdir: pathlib.Path) -> float:
  """Tokens of the most loaded expert of the sparse layer over an equal share, in the last step that was logged."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  load = next(row['router/block_00/load'] for row in reversed(rows) if 'router/block_00/load' in row)
  return max(load) * len(load)


EFFECT = Effect(
    system='BASE layers',
    claim='Without the assignment, and without a loss, some experts get far more tokens than others.',
    program='experiments.paper_effects.programs.together',
    variants={'balanced assignment': {}, 'best expert': {}},
    metric=heaviest_load, larger='best expert', smaller='balanced assignment', at_least=2.)
