"""Measurements as ratios to the dense floor of the same process and round, with targets."""
import statistics
from typing import NamedTuple

from experiments.dispatch_benchmark import programs
from experiments.dispatch_benchmark.programs import Program, Size

PASSES = False, True  # backward or not
NAMES = {
    'einsum': ('`einsum` in groups of 512 tokens, capacity 1.25', 'moejax'),
    'gather': ('`gather`, capacity 1.25', 'moejax'),
    'capacity': ('`grouped`, capacity 1.25', 'moejax'),
    'grouped': ('`grouped`, dropless', 'moejax'),
    'ragged_dot': ('`grouped` on `jax.lax.ragged_dot`', 'ragged_dot'),
    'tokamax': ("`grouped` on tokamax's `ragged_dot`", 'tokamax'),
    'block': ('`kernels.expert_block` alone', 'moejax'),
    'mixtral_eager': ('Mixtral block of transformers, `eager`', 'torch'),
    'mixtral_grouped_mm': ('Mixtral block of transformers, `grouped_mm`', 'torch'),
}


class Spread(NamedTuple):
  """Median and quartiles over rounds."""
  median: float
  low: float
  high: float

  def __str__(self):
    low, median, high = (f'{x:.0f}' if self.median >= 20 else f'{x:.2f}' for x in (self.low, self.median, self.high))
    return f'{median} ({low}–{high})'


def spread(values: list[float]) -> Spread:
  """Median and quartiles of `values`."""
  if len(values) == 1:
    return Spread(*values * 3)
  low, median, high = statistics.quantiles(values, n=4, method='inclusive')
  return Spread(median, low, high)


class Report:
  """Reads the results of `cpu.py`. Methods return None for programs that were not measured."""

  def __init__(self, results: dict):
    """`results`: the content of cpu.json."""
    self.results = results
    self.size = Size(**{**results['size'], 'experts': tuple(results['size']['experts'])})

  def measured(self, case: str, peer: str, program: Program) -> dict | None:
    """Seconds of all rounds and memory, as reported by the peer."""
    return self.results['cases'].get(case, {}).get('peers', {}).get(peer, {}).get('programs', {}).get(program.key)

  def ratio(self, case: str, program: Program, over: Program | None = None, peer: str = 'moejax',
            over_peer: str | None = None) -> Spread | None:
    """Time of `program` divided by another's, by default its floor in the same process, within each round."""
    pair = self.measured(case, peer, program), self.measured(case, over_peer or peer, over or program.floor)
    if None in pair:
      return None
    return spread([mine / other for mine, other in zip(pair[0]['seconds'], pair[1]['seconds'], strict=True)])

  def memory(self, case: str, program: Program, field: str, peer: str = 'moejax') -> float | None:
    """Bytes of `program` divided by those of its floor; `field`: 'temporary_bytes' or 'peak_bytes'."""
    pair = self.measured(case, peer, program), self.measured(case, peer, program.floor)
    if None in pair or not pair[0].get(field) or not pair[1].get(field):
      return None
    return pair[0][field] / pair[1][field]


def table(results: dict) -> str:
  """Three tables: targets, growth with E, and growth with the rest; and the source of the results."""
  report = Report(results)
  return '\n\n'.join((_targets(report), _layers(report), _growth(report), source(results)))


def judged(measured: Spread | float | None, target: float | None, least: bool = False) -> str:
  """Two cells: the measurement, in bold and marked as missed if it does not reach the target, and the target."""
  if measured is None:
    return '– | –'
  text = str(measured) if isinstance(measured, Spread) else f'{measured:.2f}'
  if target is None:
    return f'{text} | –'
  value = measured.median if isinstance(measured, Spread) else measured
  met = value >= target if least else value <= target
  return f'{text if met else f"**{text}, missed**"} | {"≥" if least else "≤"} {target:g}'


def _targets(report):
  size = report.size
  few, some, many = size.experts[0], size.middle, size.experts[-1]
  over_floor = lambda what, experts: [report.ratio('layers', size.program(what, experts, backward))
                                      for backward in PASSES]
  growth = [report.ratio('layers', size.program('grouped', many, backward), size.program('grouped', few, backward))
            for backward in PASSES]
  temporaries = [report.memory('layers', size.program('grouped', many, backward), 'temporary_bytes')
                 for backward in PASSES]
  routing = lambda experts: [
      report.ratio('layers', size.program('routing', experts, backward), size.program('grouped', experts, backward))
      for backward in PASSES]
  faster = lambda experts: [
      report.ratio('slow', size.program('ragged_dot', experts, backward),
                   size.program('grouped', experts, backward), 'ragged_dot', 'moejax') for backward in PASSES]
  rows = [
      (f'`grouped` over dense, E={few}', over_floor('grouped', few), (1.15, 1.10)),
      (f'`grouped` over dense, E={many}', over_floor('grouped', many), (1.35, 1.30)),
      (f'`grouped`, time at E={many} over E={few}', growth, (1.35, 1.35)),
      (f'`grouped`, temporaries over those of dense, E={many}', temporaries, (1, 1)),
      *((f'{NAMES[what][0]}, over dense, E={experts}', over_floor(what, experts), (1.35, 1.28))
        for what in ('capacity', 'gather') for experts in (few, many)),
      (f'router, sort and permutations over the layer, E={few}', routing(few), (0.08, 0.08)),
      (f'router, sort and permutations over the layer, E={many}', routing(many), (0.08, 0.08)),
  ]
  lines = _head('target', 'forward', 'at', 'forward and backward', 'at')
  lines += [_row(what, *map(judged, measured, targets)) for what, measured, targets in rows]
  for experts, target in zip(dict.fromkeys((few, some)), (7, 25)):
    forward, both = faster(experts)
    lines.append(_row(f'`ragged_dot` over `grouped`, E={experts}', judged(forward, None),
                      judged(both, target, least=True)))
  return '\n'.join(lines)


def _layers(report):
  size = report.size
  lines = _head('time over dense: forward, forward and backward', *(f'E={experts}' for experts in size.experts),
                f'peak memory over dense, E={size.experts[-1]}')
  rows = [('layers', what, 'gelu') for what in programs.DISPATCHERS]
  rows += [('layers', 'block', 'gelu'), ('slow', 'ragged_dot', 'gelu'), ('slow', 'tokamax', 'gelu')]
  rows += [(case, what, 'swiglu') for case, what in (
      ('swiglu', 'grouped'), ('swiglu', 'mixtral_grouped_mm'), ('slow', 'mixtral_eager'))]
  for case, what, activation in rows:
    name, peer = NAMES[what]
    program = lambda experts, backward: size.program(what, experts, backward, activation=activation,
                                                     load='multinomial' if what == 'block' else '')
    ratios = [[report.ratio(case, program(experts, backward), peer=peer) for backward in PASSES]
              for experts in size.experts]
    if any(any(pair) for pair in ratios):
      memory = report.memory(case, program(size.experts[-1], True), 'peak_bytes', peer)
      lines.append(_row(name + (', SwiGLU' if activation == 'swiglu' else ''),
                        *(', '.join(map(str, pair)) if all(pair) else '–' for pair in ratios),
                        '–' if memory is None else f'{memory:.2f}'))
  return '\n'.join(lines)


def _growth(report):
  size = report.size
  lines = _head(f'time over dense, forward and backward, E={size.middle}',
                *(NAMES[what][0] for what in ('gather', 'grouped', 'block')))
  layers = lambda case, **shape: [report.ratio(case, size.program(what, size.middle, **shape))
                                  for what in ('gather', 'grouped')]
  rows = [(f'K={k}', [*layers('choices', choices=k), None]) for k in programs.CHOICES]
  rows += [(f'T={t}', [*layers('tokens', tokens=t), None]) for t in size.token_counts]
  rows += [(f'{load} load', [None, None, report.ratio('load', size.program('block', size.middle, load=load))])
           for load in programs.LOADS]
  lines += [_row(name, *('–' if ratio is None else str(ratio) for ratio in ratios)) for name, ratios in rows]
  return '\n'.join(lines)


def source(results: dict) -> str:
  """The source of the results: command, commit, machine, versions."""
  size, measured = results['size'], results['cases'].values()
  one = lambda values: ', '.join(dict.fromkeys(str(value) for value in values))
  versions = {name: version for case in measured for peer in case['peers'].values()
              for name, version in peer['versions'].items()}
  loads = [load for case in measured for load in case['load_average']]
  return (
      f'T={size["tokens"]}, D={size["dim"]}, F={size["hidden"]}, K=2, GELU unless it says otherwise, float32. Medians '
      f'(quartiles) over {one(case["rounds"] for case in measured)} rounds that run every program once; a ratio is '
      'taken within a round, and to the dense floor of the same process. Peak memory is of temporary arrays and results, '
      f'gradients of all experts included. `{results["command"]}`, '
      f'commit {one(case["environment"]["commit"] for case in measured)}, '
      f'{one(case["environment"]["machine"] for case in measured)}, load average {min(loads):.1f} to {max(loads):.1f}, '
      f'{", ".join(f"{name} {version}" for name, version in versions.items())}.')


def _head(*cells):
  return [_row(*cells), '|' + '---|' * len(cells)]


def _row(*cells):
  return f'| {" | ".join(cells)} |'
