"""Fills the tables of README.md and docs/ from committed results: `python -m experiments.tables`.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. Do not edit it by hand.
"""
import importlib
import json
import re

from experiments import compare, development, runner
from experiments.chitchat import compared
from moejax import units

PAGES = (runner.ROOT / 'README.md', *sorted((runner.ROOT / 'docs').glob('*.md')))


def digits() -> str:
  """Accuracy of sparse and dense vision transformers."""
  results = runner.load('digits')
  return _compared(results, results['runs'], runner.find('digits').metrics)


def chitchat() -> str:
  """Bits per byte of sparse and dense decoders beside a trigram model."""
  return _compared(runner.load('chitchat'), *compared.decoders())


def span_corruption() -> str:
  """Loss of ST-MoE and a dense T5 on the masked bytes that the decoder predicts."""
  return _compared(runner.load('chitchat'), *compared.spans())


def first_run() -> str:
  """The cost of the first command."""
  results = runner.load('first_run')
  run, = results['runs']
  return (f'Whole process: {run["seconds"]:.0f} s, {run["peak_memory_mib"] / 1024:.1f} GiB at its peak, '
          f'test accuracy {run["metrics"]["eval/test/accuracy"]:.1%} '
          f'(`{results["command"]}`, commit {run["commit"]}, {run["machine"]}, Python {run["python"]}, jax {run["jax"]}).')


def dispatch_cpu() -> str:
  """Time of each dispatcher relative to a dense layer on a CPU, with targets."""
  return _dispatch('cpu', 'report', 'Not measured yet')


def dispatch_gpu() -> str:
  """The kernels on a GPU, beside other libraries."""
  return _dispatch('gpu', 'gpu', 'Not measured on a GPU yet')


def dispatch_tpu() -> str:
  """Estimates for the kernels on TPUs."""
  return _dispatch('tpu', 'tpu', 'Not estimated yet')


def faults() -> str:
  """Faults injected into runs, and whether they survived."""
  path = runner.ROOT / 'experiments/faults/results.json'
  if not path.exists():
    return 'Not run yet: `python -m experiments.faults.sweep` does that and writes `results.json`.'
  return importlib.import_module('experiments.faults.report').table(json.loads(path.read_text()))


def pod_plans() -> str:
  """Memory and time of large models on pods: estimates from compiled programs."""
  if not (runner.ROOT / 'experiments/pod_plans/results.json').exists():
    return 'Not planned yet: `python -m experiments.runner pod_plans` does that, in some minutes a model.'
  results = runner.load('pod_plans')
  lines = ['| model | parameters, active | chips, mesh | memory a chip | step | MFU | collectives | of the step |',
           '|---' * 8 + '|']
  for run in results['runs']:
    plan = run['metrics']
    mesh = ' '.join(f'{axis} {size}' for axis, size in plan['mesh'].items() if size > 1)
    memory, program = plan['memory_bytes'], plan['program']
    seconds = program['seconds']
    sent = sum(kind['bytes'] for kind in program['collectives'].values())
    lines.append('| ' + ' | '.join([
        run['name'], ', '.join(f'{plan["parameters"][which] / 1e9:.1f} G' for which in ('total', 'active')),
        f'{plan["topology"]}, {mesh}' + (f', {plan["accumulate"]} microbatches' if plan['accumulate'] > 1 else ''),
        f'{units.size(memory["total"])} of {units.size(memory["available"])}', units.duration(seconds['step']),
        f'{program["mfu"]:.0%}', units.size(sent), f'{seconds["communication"] / seconds["step"]:.0%}']) + ' |')
  run = results['runs'][-1]
  return '\n'.join(lines) + (
      '\n\nAll fit. Nothing was run: times and MFU are estimates from programs that the chips\' own compilers made, '
      'and memory is what these report. A step takes the longer of FLOPs / peak and bytes / memory bandwidth, and then its '
      f'collectives, which nothing hides (`{results["command"]}`, commit {run["commit"]}, Python {run["python"]}, '
      f'jax {run["jax"]}; the full commands are in experiments/pod_plans/results.json).')


TABLES = {'digits': digits, 'chitchat': chitchat, 'span_corruption': span_corruption, 'first_run': first_run,
          'dispatch_cpu': dispatch_cpu, 'dispatch_gpu': dispatch_gpu, 'dispatch_tpu': dispatch_tpu,
          'pod_plans': pod_plans, 'faults': faults, 'tests': development.times, 'mutants': development.mutants,
          'fuzz': development.fuzz}


def fill(text: str) -> str:
  """`text` with every table regenerated."""
  def table(match):
    return f'<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->'
  return re.sub(r'<!-- table:(\w+) -->\n.*?<!-- end -->', table, text, flags=re.S)


def _dispatch(device, module, missing):
  path = runner.ROOT / f'experiments/dispatch_benchmark/{device}.json'
  if not path.exists():
    return f'{missing}: `python -m experiments.dispatch_benchmark.{device}` does that and writes `{path.name}`.'
  # Imported only if there are results: the code for a table of kernels also imports the kernels.
  return importlib.import_module(f'experiments.dispatch_benchmark.{module}').table(json.loads(path.read_text()))


def _compared(results, rows, *shown):
  return f'{compare.table(rows, *shown)}\n\n{compare.source({**results, "runs": rows})}'


if __name__ == '__main__':
  for page in PAGES:
    page.write_text(fill(page.read_text()))
  print(f'Filled {", ".join(TABLES)} in README.md and docs/.')
