"""The report of a run: its sections, their order, and how to read them.

`write(workdir, setup, params, router_state)` writes `report/index.html`, one file that needs no network, from the logs
of the run (metrics.jsonl, evaluations.jsonl) and from running the model on evaluation batches.
"""
import math
import re
from pathlib import Path

import jax

from moejax import buckets
from moejax.analysis import history, page, plots, routes, specialisation_report, trouble
from moejax.config import at
from moejax.evaluation import log as log_lib
from moejax.evaluation import passes
from moejax.functional import Tree, flatten
from moejax.models.counts import Parameters, parameters_by_part
from moejax.training import initial
from moejax.training import metrics as metrics_lib
from moejax.training import workdir as workdir_lib
from moejax.training.setup import Setup


def write(workdir: str | Path, setup: Setup, params: Tree, router_state: Tree, into: Path | None = None) -> Path:
  """Writes `<workdir>/report/index.html` and its pictures as PNG beside it; returns its path.

  Args:
    workdir: of the run; a missing or empty metrics.jsonl only omits sections.
    setup: of the run (`training.setup.prepare`).
    params, router_state: to evaluate. All processes must call this; the first one writes.
    into: folder in which report/ is written; None: `workdir`.
  """
  workdir = buckets.path(workdir)
  folder = (into or workdir) / 'report'
  with at('config.data'):
    split = passes.Split(setup.pipeline, setup.mesh, _split(setup), None)
  taken = routes.collect(setup.model, params, router_state, split, setup.mesh)
  if jax.process_index() != 0:
    return folder / 'index.html'
  folder.mkdir(parents=True, exist_ok=True)
  rows = metrics_lib.read(workdir)
  series = history.series(rows)
  parts = parameters_by_part(setup.model, setup.pipeline.batch_spec())
  sections = [
      ('Learning', learning(folder, series)),
      ('Trouble', trouble.section(series)),
      ('Balance', balance(folder, series, taken)),
      ('Specialisation', specialisation_report.section(folder, taken, setup.pipeline)),
      ('Evaluation', evaluation(workdir, setup, rows)),
      ('Model', model(workdir, setup, parts)),
      ('Config', page.details('Show the full config', page.code(workdir_lib.dumps(setup.config)))),
  ]
  head = summary(parts, rows, series, taken)
  (folder / 'index.html').write_text(
      page.document(f'moejax run: {(into or workdir).resolve().name}', head, sections), encoding='utf-8')
  return folder / 'index.html'


def summary(parts: dict[str, Parameters], rows: list[dict], series: dict[str, history.Series],
            taken: routes.BatchRoutes) -> str:
  """The key figures, and remarks on them."""
  cards = {'training steps': rows[-1]['step'] if rows else 0}
  headline = {name.replace('/', ' ').replace('_', ' '): value for name, value in history.last(rows, 'eval/').items()
              if name.rpartition('/')[2] in ('accuracy', 'precision_at_1', 'loss', 'bits_per_byte')}
  cards |= dict(list(headline.items())[:4])
  cards |= {'parameters': page.short(sum(part.total for part in parts.values())),
            'active parameters per token': page.short(sum(part.active for part in parts.values())),
            'sparse layers': len(taken.layers)}
  if taken.layers:
    cards['experts per layer'] = '–'.join(str(e) for e in sorted({one.num_experts for one in taken.layers.values()}))
  return page.cards(cards) + ''.join(page.paragraph(text) for text in trouble.remarks(series) + remarks(taken))


def remarks(taken: routes.BatchRoutes) -> list[str]:
  """Remarks on the routing, one sentence each."""
  if not taken.layers:
    return ['This model has no sparse layers, so there is no routing to report.']
  said = []
  for name, layer in taken.layers.items():
    multiples = layer.load * layer.num_experts
    idle = int((multiples < 0.25).sum())
    if idle:
      said.append(f'{name}: {idle} of {layer.num_experts} experts receive less than a quarter of an equal share. '
                  'A larger coefficient of the balance loss spreads the load.')
    if layer.metrics['dropped'] > 0.1:
      said.append(f'{name}: {layer.metrics["dropped"]:.0%} of the choices are dropped. '
                  'The capacity factor of evaluation can be raised without retraining.')
  return said or ['No expert is idle, and no layer drops more than 10% of the choices.']


def learning(folder: Path, series: dict[str, history.Series]) -> str:
  """Losses and metrics over the steps."""
  panels = learning_panels(series)
  if not panels:
    return page.paragraph('There are no metrics yet: metrics.jsonl is missing or empty.')
  shares = [label for label in panels if 'accuracy' in label or 'precision' in label]
  return page.picture(
      folder, 'learning', lambda: plots.curves(panels, percent=shares),
      alt='Curves over training steps of ' + ', '.join(panels) + '.',
      caption='Healthy: losses fall and flatten, and evaluation follows training. A rising evaluation loss with a '
              'falling training loss means overfitting; the gap between the two training losses is the router losses.')


def learning_panels(series: dict[str, history.Series]) -> dict[str, dict[str, plots.Line]]:
  """`{y label: {line label: (steps, values)}}`: training and all evaluators in one panel per metric."""
  panels: dict[str, dict[str, plots.Line]] = {'loss (nats)': {}, 'accuracy': {}}
  for key, label, line in (('train/loss', 'loss (nats)', 'training'),
                           ('train/cross_entropy', 'loss (nats)', 'training, no router losses'),
                           ('train/accuracy', 'accuracy', 'training')):
    if key in series:
      panels[label][line] = (series[key].steps, series[key].values)
  for name in sorted(series, key=_numbers_by_value):
    room, _, rest = name.partition('/')
    evaluator, _, metric = rest.partition('/')
    if room != 'eval' or metric.startswith('router/') or metric in ('examples', 'tokens'):
      continue
    shots, found, _ = metric.partition('_shot_accuracy')
    label = 'few-shot accuracy' if found else 'loss (nats)' if metric == 'loss' else metric.replace('_', ' ')
    line = f'{evaluator}, {shots} per class' if found else evaluator
    panels.setdefault(label, {})[line] = (series[name].steps, series[name].values)
  return {label: lines for label, lines in panels.items() if lines}


def balance(folder: Path, series: dict[str, history.Series], taken: routes.BatchRoutes) -> str:
  """The load of experts: at evaluation, and over training."""
  if not taken.layers:
    return page.paragraph('This model is dense: every token uses all parameters, so there is no load to balance.')
  parts = [page.picture(
      folder, 'load', lambda: plots.load_by_layer({name: layer.load for name, layer in taken.layers.items()}),
      alt='Heat map of the load of each expert in each sparse layer on evaluation batches. ' + _extremes(taken),
      caption='Load on evaluation batches: the share of routing choices that select an expert, before capacity. 1 is '
              'an equal share (white). Healthy: pale everywhere. Dark brown experts are hardly used; dark blue-green '
              'ones are overloaded and drop tokens if there is a capacity.')]
  loads = {name: one for name, one in history.router_layers(series, 'load').items() if one.values.ndim == 2}
  shown = {name: (loads[name].steps, loads[name].values) for name in plots.spread(list(loads), 12)}
  if shown:
    parts.append(page.picture(
        folder, 'load_over_time', lambda: plots.load_over_time(shown),
        alt='Heat maps of the load of each expert over training steps, one for each of the layers ' + ', '.join(shown),
        caption='Load in training, on the same scale. Healthy: after the first steps no row stays dark brown. A row '
                'that turns brown and stays brown is a dead expert; alternating colours mean that routing oscillates.'))
  parts += [_routing_over_time(folder, series, taken), _router_table(taken)]
  return ''.join(parts)


def _routing_over_time(folder, series, taken):
  experts = {layer.num_experts for layer in taken.layers.values()}
  panels, references = {}, {}
  for metric, label in (('dropped', 'dropped choices'), ('confidence', 'router confidence')):
    layers = history.router_layers(series, metric)
    if layers:
      panels[label] = {name: (one.steps, one.values) for name, one in layers.items()}
  if 'router confidence' in panels and len(experts) == 1:
    references['router confidence'] = (f'uniform, 1/{min(experts)}', 1 / min(experts))
  for name in sorted({key.rsplit('/', 1)[1] for key in series if key.startswith('router/') and key.endswith('_loss')}):
    panels[name.replace('_', ' ')] = {
        layer: (one.steps, one.values) for layer, one in history.router_layers(series, name).items()}
  if not panels:
    return ''
  return page.picture(
      folder, 'routing_over_time',
      lambda: plots.curves(panels, references, percent=('dropped choices', 'router confidence')),
      alt='Curves over training steps, one line per sparse layer, of ' + ', '.join(panels) + '.',
      caption='Dropped: the share of routing choices that are not computed because the buffer of the expert was full; '
              '0 without a capacity. Healthy: low or falling. Confidence: the mean of the largest router probability, '
              'between 1/E (undecided) and 1. Healthy: rises above 1/E and stays below 1. Losses are shown before '
              'multiplication by their coefficients. Healthy: balance losses fall to their minimum, reached by uniform '
              'routing: 0 if they measure variation, else 1, or K in the convention of some papers.')


def _router_table(taken):
  names = sorted({metric for layer in taken.layers.values() for metric in layer.metrics})
  rows = []
  for name, layer in taken.layers.items():
    multiples = layer.load * layer.num_experts
    rows.append([name, layer.num_experts, layer.experts_per_token, float(multiples.max()), float(multiples.min()),
                 *(layer.metrics.get(metric, '') for metric in names)])
  head = ['layer', 'experts', 'rows per token', 'busiest (×1/E)', 'idlest (×1/E)',
          *(metric.replace('_', ' ') for metric in names)]
  some = next(iter(taken.layers.values())).num_experts
  note = (f'On evaluation batches. Uniform routing over {some} experts has confidence {1 / some:.3g} and an entropy of '
          f'{math.log(some):.3g} nats; a certain router has confidence 1 and entropy 0. "Rows per token" is the '
          'number of rows of expert computation per token, filled or not; "experts per token" is the mean number of '
          'choices of experts that are computed.')
  return '<h3>Metrics of every router</h3>' + page.paragraph(note) + page.table(head, rows)


def evaluation(workdir: Path, setup: Setup, rows: list[dict]) -> str:
  """The last metrics of training, later evaluations of checkpoints, and commands for more."""
  evaluated = [row for row in rows if any(name.startswith('eval/') for name in row)]
  measured = [(row['step'], 'in training', {name.removeprefix('eval/'): value for name, value in row.items()
                                             if name.startswith('eval/')}) for row in evaluated[-1:]]
  for line in log_lib.read(workdir):
    changes = ', '.join(f'{key}={value}' for key, value in line['overrides'].items())
    measured.append((line['step'], changes or 'unchanged', line['metrics']))
  names = {name for _, _, metrics in measured for name in metrics if '/router/' not in name}
  names = sorted(names, key=_numbers_by_value)
  table = page.table(['step', 'config', *names],
                     [[step, what, *(metrics.get(name, '') for name in names)] for step, what, metrics in measured])
  command = f'python -m moejax.evaluate --workdir={workdir}'
  options = [f'--config.{path}={value}' for path, value in _worth_changing(setup.config.model)]
  return (table if names else '') + '<h3>Evaluate again</h3>' + page.paragraph(
      'From the checkpoint alone. A different number of experts per token, or a different capacity, uses the same '
      'parameters.') + page.code('\n'.join([command, *(f'{command} {option}' for option in options)]))


def model(workdir: Path, setup: Setup, parts: dict[str, Parameters]) -> str:
  """Parameters by part, a list of all of them, and what they started from."""
  rows = [[name, part.total, round(part.active)] for name, part in parts.items()]
  rows.append(['all', sum(part.total for part in parts.values()), round(sum(part.active for part in parts.values()))])
  axes = flatten(setup.model.axes)
  each = [[path, ' × '.join(map(str, leaf.shape)) or 'scalar', ', '.join(str(a) for a in axes[path]),
           math.prod(leaf.shape)] for path, leaf in flatten(setup.model.shapes()[0]).items()]
  lineage = initial.lineage(workdir)
  origin = page.paragraph(initial.sentence(lineage)) if lineage else ''
  return page.table(['part', 'parameters', 'active per token'], rows) + origin + page.details(
      'Show every parameter', page.table(['parameter', 'shape', 'axes', 'count'], each))


def _split(setup: Setup) -> str:
  asked = [config.get('split', 'test') for config in setup.config.evaluation.evaluators.values()]
  return next(iter(asked), setup.pipeline.splits[-1])


def _numbers_by_value(name):
  # 'a/5_shot' before 'a/10_shot'
  return [(0, int(part), '') if part.isdigit() else (1, 0, part) for part in re.split(r'(\d+)', name)]


def _extremes(taken):
  multiples = {name: layer.load * layer.num_experts for name, layer in taken.layers.items()}
  high = max(multiples, key=lambda name: multiples[name].max())
  low = min(multiples, key=lambda name: multiples[name].min())
  return (f'The busiest is expert {multiples[high].argmax()} of {high} with {multiples[high].max():.2f} times an equal '
          f'share, the idlest expert {multiples[low].argmin()} of {low} with {multiples[low].min():.2f} times.')


def _worth_changing(config, path='model'):
  """(config path, another value) of the number of experts per token and of the capacity, if the model has them."""
  found = []
  for key, value in config.items():
    if hasattr(value, 'items'):
      if key == 'router' and isinstance(value.get('select', {}).get('k'), int):
        found.append((f'{path}.router.select.k', max(value['select']['k'] - 1, 1)))
      if key == 'router' and value.get('place', {}).get('capacity_factor'):
        found.append((f'{path}.router.place.eval_capacity_factor', 2.0))
      found += _worth_changing(value, f'{path}.{key}')
  return found
