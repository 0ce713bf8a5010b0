"""Measures moejax's kernels and layer on a Hopper GPU against dense products and other libraries.

    python -m experiments.dispatch_benchmark.gpu            about an hour; nothing else should use the GPU
    python -m experiments.dispatch_benchmark.gpu --quick    small shapes: does everything run?

Writes gpu.json in this folder (with --quick in runs/dispatch_benchmark) after each process, and prints the table of the
README. Each process times its programs and the dense floor in turns; everything is a ratio to that floor.
Kernels use the tabulated tiles; run `python -m moejax.kernels.tuning` before to tune them.
"""
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from absl import app, flags
from tqdm import tqdm

from experiments import runner
from moejax.kernels import hopper
from moejax.kernels.choice import Shape
from moejax.kernels.target import target

FOLDER = pathlib.Path(__file__).parent
LOADS = 'multinomial', 'zipf'
ROUNDS = 11


def shape(rows: int, dim: int, hidden: int, experts: int, choices: int, activation: str = 'swiglu', **more) -> dict:
  """A layer of `experts` with `rows` choices in total."""
  return dict(rows=rows, dim=dim, hidden=hidden, experts=experts, choices=choices, activation=activation, **more)


SHAPES = {
    'Mixtral 8x7B': shape(16384, 4096, 14336, 8, 2),
    'Qwen3-30B': shape(262144, 2048, 768, 128, 8),
    'OLMoE': shape(262144, 2048, 1024, 64, 8),
    'DeepSeek-V3, 1/8 of the experts': shape(131072, 7168, 2048, 32, 8),
    'V-MoE-B': shape(25088, 768, 3072, 32, 2, 'gelu'),
    'fine': shape(327680, 768, 256, 128, 8),
    **{f'{experts} experts': shape(262144, 2048, 1024, experts, 8, growth=True)
       for experts in (8, 16, 32, 64, 128, 256)},
}
QUICK_SHAPES = {'quick': shape(2048, 256, 512, 4, 2), '8 experts': shape(2048, 256, 256, 8, 2, growth=True),
                '256 experts': shape(2048, 256, 256, 256, 2, growth=True)}
COARSE = [name for name, of in SHAPES.items() if of['rows'] >= 1024 * of['experts'] and not of.get('growth')]
FORWARD, BOTH = 'forward', 'forward and backward'


class Goal(NamedTuple):
  """A target for a ratio at multinomial loads: `measured(Results, shape)` should be at least `least`, or at most
  `-least` if that is negative."""
  what: str
  shapes: list[str]
  least: float
  measured: Callable[['Results', str], float | None]

  def met(self, ratio: float) -> bool:
    """Whether `ratio` reaches the target."""
    return ratio >= self.least if self.least > 0 else ratio <= -self.least


class Results:
  """Reads gpu.json. Ratios that were not measured are None."""

  def __init__(self, results: dict):
    """`results`: the content of the file."""
    self.shapes, self.cases = results['shapes'], results['cases']

  def facts(self, shape: str, peer: str, load: str = 'multinomial') -> dict:
    """A process's answer for a load: seconds by program, errors, facts; {} if it did not run."""
    return self.cases.get(shape, {}).get(peer, {}).get('loads', {}).get(load, {})

  def speed(self, shape: str, peer: str, program: str, floor: str, load: str = 'multinomial') -> list[float] | None:
    """Time of the dense `floor` divided by the time of `program`, in each round."""
    seconds = self.facts(shape, peer, load).get('seconds', {})
    if program not in seconds or floor not in seconds:
      return None
    return [dense / sparse for dense, sparse in zip(seconds[floor], seconds[program], strict=True)]

  def of(self, shape: str, peer: str, whose: str, what: str, load: str = 'multinomial') -> list[float] | None:
    """Speeds of a library's program relative to the dense floor, with its fastest tiles."""
    names = [name for name in self.facts(shape, peer, load).get('seconds', {})
             if name.partition(' ')[0].partition('@')[0] == whose and name.partition(' ')[2] == what]
    found = [self.speed(shape, peer, name, f'dense {what}', load) for name in names]
    return max(filter(None, found), key=_median, default=None)

  def ours(self, shape: str, what: str) -> float | None:
    """The median for moejax."""
    return _median(self.speed(shape, 'moejax', f'moejax {what}', f'dense {what}'))

  def over(self, shape: str, what: str, peer: str, whose: str) -> float | None:
    """Speed of moejax divided by that of another library."""
    ours, theirs = self.ours(shape, what), _median(self.of(shape, peer, whose, what))
    return None if None in (ours, theirs) else ours / theirs

  def eight_bits(self, shape: str) -> float | None:
    """Speed of 8-bit products divided by that of 16-bit products."""
    return _median(self.speed(shape, 'moejax', 'moejax fp8 forward', 'moejax forward'))

  def growth(self, _: str) -> float | None:
    """Time with the most experts divided by the time with the fewest, for the same rows."""
    names = sorted((name for name, of in self.shapes.items() if of.get('growth')),
                   key=lambda name: self.shapes[name]['experts'])
    speeds = [self.ours(name, BOTH) for name in (names[0], names[-1])]
    return None if None in speeds else speeds[0] / speeds[1]

  def saved(self, shape: str) -> float | None:
    """Bytes saved for the backward pass divided by those of tokens and pre-activations (SonicMoE, arXiv:2512.14080)."""
    of, kept = self.shapes[shape], self.facts(shape, 'moejax').get('facts', {}).get('saved_bytes')
    if kept is None:
      return None
    gates = 2 if of['activation'] == 'swiglu' else 1
    tokens = 2 * of['rows'] // of['choices'] * of['dim']
    # The tokens are an argument, so they are not among the saved bytes.
    return (kept + tokens) / (tokens + 2 * of['rows'] * of['hidden'] * gates)


LAYERS = [name for name, of in SHAPES.items() if name in ('Qwen3-30B', 'OLMoE')]
# Targets; coarse experts have 1024 rows or more each.
GOALS = [
    Goal('forward / dense', COARSE, 0.75, lambda r, s: r.ours(s, FORWARD)),
    Goal('dX / dense', COARSE, 0.72, lambda r, s: r.ours(s, 'dX')),
    Goal('dW / dense', COARSE, 0.75, lambda r, s: r.ours(s, 'dW')),
    Goal("forward and backward / tokamax's", COARSE, 2.2, lambda r, s: r.over(s, BOTH, 'tokamax', 'tokamax')),
    Goal("forward and backward / lax.ragged_dot's", COARSE, 6., lambda r, s: r.over(s, BOTH, 'jax', 'ragged_dot')),
    Goal("forward / torch._grouped_mm's", COARSE, 1., lambda r, s: r.over(s, FORWARD, 'torch', 'torch')),
    Goal("forward / ragged_dot_mgpu's", COARSE, 1.1, lambda r, s: r.over(s, FORWARD, 'jax', 'ragged_dot_mgpu')),
    Goal('layer forward / dense', ['Mixtral 8x7B'], 0.75, lambda r, s: r.ours(s, 'layer forward')),
    Goal('layer forward / dense', LAYERS, 0.55, lambda r, s: r.ours(s, 'layer forward')),
    Goal('layer forward and backward / dense', ['Mixtral 8x7B'], 0.70, lambda r, s: r.ours(s, f'layer {BOTH}')),
    Goal('layer forward and backward / dense', LAYERS, 0.50, lambda r, s: r.ours(s, f'layer {BOTH}')),
    Goal('bytes saved / tokens and pre-activations', COARSE, -1.3, Results.saved),
    Goal('time with 256 experts / with 8', ['256 experts'], -1.35, Results.growth),
    Goal('8-bit forward / 16-bit', COARSE, 1.5, Results.eight_bits),
]


# Columns of the table: peer, library and program.
COLUMNS = [('moejax', 'moejax', what) for what in (FORWARD, 'dX', 'dW', BOTH, f'layer {FORWARD}', f'layer {BOTH}')] + [
    ('tokamax', 'tokamax', BOTH), ('jax', 'ragged_dot', BOTH), ('jax', 'ragged_dot_mgpu', FORWARD),
    ('torch', 'torch', FORWARD)]


def table(results: dict) -> str:
  """Targets and measurements by shape; then speeds relative to the dense floor by load, as markdown."""
  read = Results(results)
  head = lambda *cells: ['| ' + ' | '.join(cells) + ' |', '|---' * len(cells) + '|']
  lines = head('speed (or time, bytes)', 'at least (most)', *read.shapes)
  for goal in GOALS:
    ratios = [goal.measured(read, name) if name in goal.shapes else None for name in read.shapes]
    cells = ['' if ratio is None else f'{ratio:.2f}{"" if goal.met(ratio) else " (missed)"}' for ratio in ratios]
    lines.append(f'| {goal.what} | {goal.least if goal.least > 0 else f"({-goal.least})"} | {" | ".join(cells)} |')
  lines += ['', 'Speed over the dense floor of the same process, median (least–most) of '
            f'{results["rounds"]} rounds:', '',
            *head('shape', 'load', *(f'{whose} {what}' for _, whose, what in COLUMNS))]
  for name in read.shapes:
    for load in LOADS:
      cells = [_spread(read.of(name, peer, whose, what, load)) for peer, whose, what in COLUMNS]
      lines.append(f'| {name} | {load} | {" | ".join(cells)} |')
  of = results['environment']
  return '\n'.join(lines) + f'\n\n`{results["command"]}`, commit {of["commit"]}, {results["device"]}, jax {of["jax"]}.'


def peers() -> dict[str, list[str]]:
  """The command of each process; prints one sentence for each missing peer."""
  jax_programs = [sys.executable, '-m', 'experiments.dispatch_benchmark.gpu_programs']
  found = {'moejax': [*jax_programs, 'moejax'], 'jax': [*jax_programs, 'jax']}
  for peer, module in ('tokamax', 'gpu_programs'), ('torch', 'gpu_torch'):
    if importlib.util.find_spec(peer):
      found[peer] = [sys.executable, '-m', f'experiments.dispatch_benchmark.{module}', peer]
    else:
      print(f'{peer} is not measured: it is not installed.')
  return found


def ask(command: list[str], job: dict) -> dict:
  """Runs a process to its end; returns its answer, or {'error': its last output}."""
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder) / name for name in ('job.json', 'answer.json')]
    paths[0].write_text(json.dumps(job))
    # Only one process at a time may allocate the GPU's memory; this one must use hardly any.
    done = subprocess.run([*command, *map(str, paths)], cwd=runner.ROOT, capture_output=True, text=True,
                          env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'})
    if done.returncode:
      return dict(error=(done.stderr.strip().splitlines() or ['no error message'])[-1])
    return json.loads(paths[1].read_text())


def measure(shapes: dict[str, dict], rounds: int, path: pathlib.Path, device: str) -> dict:
  """Measures all shapes with all peers, one process at a time; writes the results after each."""
  path.parent.mkdir(parents=True, exist_ok=True)
  results = dict(command='python -m experiments.dispatch_benchmark.gpu', device=device, rounds=rounds,
                 environment=runner.environment(), shapes=shapes, cases={})
  commands = peers()
  jobs = [(name, peer) for name, of in shapes.items() for peer in commands if peer == 'moejax' or not of.get('growth')]
  for name, peer in tqdm(jobs):
    answer = ask(commands[peer], dict(shape=shapes[name], loads=LOADS, rounds=rounds))
    results['cases'].setdefault(name, {})[peer] = answer
    path.write_text(json.dumps(results, indent=1) + '\n')
    for problem in [answer['error']] if 'error' in answer else [
        f'{program}: {why}' for load in answer['loads'].values() for program, why in load['errors'].items()]:
      tqdm.write(f'{name}, {peer}: {problem}')
  return results


def _spread(speeds):
  return '' if speeds is None else f'{_median(speeds):.2f} ({min(speeds):.2f}–{max(speeds):.2f})'


def _median(values):
  return None if values is None else statistics.median(values)


if __name__ == '__main__':
  QUICK = flags.DEFINE_bool('quick', False, 'Small shapes and three rounds.')
  ONLY = flags.DEFINE_list('shapes', None, 'Only these shapes.')

  def main(_) -> None:
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    here = target()
    if why_not := hopper.limit(here, Shape(128, 1, 128, 128, 'bfloat16')):
      raise SystemExit(f'Nothing is measured. {why_not}')
    shapes = QUICK_SHAPES if QUICK.value else SHAPES
    shapes = {name: of for name, of in shapes.items() if not ONLY.value or name in ONLY.value}
    path = (runner.ROOT / 'runs/dispatch_benchmark' if QUICK.value else FOLDER) / 'gpu.json'
    print(table(measure(shapes, 3 if QUICK.value else ROUNDS, path, here.kind)))
    print(f'\nWritten: {path.relative_to(runner.ROOT)}')

  app.run(main)
