"""An effect that a paper reports, as something that can be measured: which variant has the larger value."""
import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.runner import Run, last_metrics

SEEDS = (0, 1, 2)
Metric = str | Callable[[pathlib.Path], float]


@dataclasses.dataclass(frozen=True)
class Effect:
  """One claim, and the runs that test it.

  Attributes:
    system: whose it is, as in the `System:` line of its config.
    claim: what is expected, in a sentence.
    metric: a key of metrics.jsonl, of which the last value counts, or a function of the run's workdir.
    larger, smaller: variants; the claim holds where the metric of the first is larger than that of the second,
    at_least: by this factor.
    variants: `{name: {key after config.: value}}`, or for a program the names. May be more than the two.
    config: what is trained; None where there is a program.
    common: config keys and values of every variant.
    program: a module of `programs`, run with `--variant=V --seed=N --out=FOLDER`, that writes FOLDER/metrics.jsonl.
    seeds: one run each.
  """
  system: str
  claim: str
  metric: Metric
  larger: str
  smaller: str
  variants: Mapping[str, Mapping[str, Any]] | tuple[str, ...]
  at_least: float = 1.0
  config: str | None = None
  common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  program: str | None = None
  seeds: tuple[int, ...] = SEEDS

  def __post_init__(self):
    if (self.config is None) == (self.program is None):
      raise ValueError(f'{self.system}: an effect is of a config or of a program, one of them.')
    if missing := {self.larger, self.smaller} - set(self.variants):
      raise ValueError(f'{self.system}: no variant {missing}; there are {list(self.variants)}.')

  @property
  def metric_name(self) -> str:
    """Under which its value stands in results."""
    return self.metric.__name__ if callable(self.metric) else self.metric

  def runs(self, name: str) -> Iterator['EffectRun']:
    """All runs. Effects whose names agree before a slash are read from the same runs where their variants agree."""
    group = name.partition('/')[0]
    for variant in self.variants:
      keys = {} if self.program else self.variants[variant]
      for seed in self.seeds:
        yield EffectRun(variant, self.config or '', seed, {**self.common, **keys}, group=group, program=self.program,
                        wanted={self.metric_name: self.metric})

  def measured(self, values: Mapping[str, list[float]]) -> dict[str, Any]:
    """What `values`, by variant and in the order of seeds, say of the claim.

    The verdict is 'shown' where the claim holds on average and the order of the two in every seed, 'opposite' where the
    order is the other one in every seed, and else 'not shown'.
    """
    larger, smaller = values[self.larger], values[self.smaller]
    verdict = 'not shown'
    # Metrics may be negative: then the factor divides.
    bar = statistics.mean(smaller) * (self.at_least if statistics.mean(smaller) >= 0 else 1 / self.at_least)
    if all(a > b for a, b in zip(larger, smaller)) and statistics.mean(larger) >= bar:
      verdict = 'shown'
    if all(a < b for a, b in zip(larger, smaller)):
      verdict = 'opposite'
    return dict(
        system=self.system, claim=self.claim, verdict=verdict, larger=self.larger, smaller=self.smaller,
        at_least=self.at_least, seeds=len(larger),
        metric=self.metric_name,
        values={variant: dict(mean=statistics.mean(numbers), deviation=statistics.stdev(numbers))
                for variant, numbers in values.items()})


@dataclasses.dataclass(frozen=True)
class EffectRun(Run):
  """A run of one variant with one seed.

  Attributes beside those of `Run`:
    group: in whose folder it runs.
    program: as of `Effect`.
    wanted: metrics that effects read from it, by name.
  """
  group: str = ''
  program: str | None = None
  wanted: Mapping[str, Metric] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> str:
    """Names the run in results and in its workdir."""
    return f'{self.group}.{re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")}-{self.seed}'

  def command(self, workdir: pathlib.Path) -> list[str]:
    """The command of this run; a training run writes no report, which would take longer than the rest."""
    if self.program:
      return ['python', '-m', f'experiments.paper_effects.programs.{self.program}', f'--variant={self.name}',
              f'--seed={self.seed}', f'--out={workdir}']
    return [*super().command(workdir), '--config.report.at=never']

  def check(self, devices: list) -> None:
    """Builds its config; a program makes its own."""
    if not self.program:
      super().check(devices)

  def metrics(self, workdir: pathlib.Path) -> dict[str, float]:
    """What effects want, and the last losses."""
    newest = last_metrics(workdir)
    losses = {key: number for key, number in newest.items() if key.startswith('eval/') or key in ('train/loss', 'step')}
    return losses | {name: float(metric(workdir) if callable(metric) else newest[metric])
                     for name, metric in self.wanted.items()}


def summary(effects: Mapping[str, Effect], results: Mapping) -> dict[str, dict]:
  """`{name: Effect.measured}` of the effects whose runs are all in `results`."""
  done = {run['key']: run for run in results['runs']}
  found = {}
  for name, effect in effects.items():
    runs = list(effect.runs(name))
    if all(run.key in done for run in runs):
      values: dict[str, list[float]] = {}
      for run in runs:
        values.setdefault(run.name, []).append(done[run.key]['metrics'][effect.metric_name])
      found[name] = effect.measured(values)
  return found


def write(path: pathlib.Path, found: Mapping[str, dict]) -> None:
  """Writes a summary, numbers to six digits."""
  rounded = json.loads(json.dumps(found), parse_float=lambda number: float(f'{float(number):.6g}'))
  path.write_text(json.dumps(rounded, indent=1) + '\n')
