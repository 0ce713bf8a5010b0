"""Compares the variants of a study: means over seeds with intervals, as a table and a figure.

    python -m experiments.compare digits

reads results.json, prints the table and draws figure.png. Intervals are 95% t intervals: over the seeds of one variant
for its mean, and Welch's for its difference from the first variant. What they are worth: docs/comparing.md.
"""
import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter
from scipy import stats

from experiments import runner
from moejax import command_line
from moejax.analysis import style
from moejax.config import ConfigError

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean, or a difference of means, and its 95% interval; None where one seed has none."""
  center: float
  low: float | None = None
  high: float | None = None


def mean(values: Sequence[float]) -> Interval:
  """Mean over seeds; its t interval (Student 1908)."""
  if len(values) < 2:
    return Interval(values[0])
  half = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
  return Interval(statistics.mean(values), *(float(statistics.mean(values) + sign * half) for sign in (-1, 1)))


def difference(values: Sequence[float], others: Sequence[float]) -> Interval:
  """Mean of `values` less that of `others`; its interval of Welch (1947), which takes no two variances for equal."""
  center = statistics.mean(values) - statistics.mean(others)
  if min(len(values), len(others)) < 2:
    return Interval(center)
  if len({*values}) == len({*others}) == 1:  # no variance, no degrees of freedom
    return Interval(center, center, center)
  found = stats.ttest_ind(values, others, equal_var=False).confidence_interval(LEVEL)
  return Interval(center, float(found.low), float(found.high))


def by_variant(rows: Sequence[Mapping], metric: str) -> dict[str, list[float]]:
  """`{name: [value of each seed]}`, in the order of the rows.

  Raises:
    ConfigError: a row without this metric.
  """
  values: dict[str, list[float]] = {}
  for row in rows:
    if metric not in row['metrics']:
      raise ConfigError(f'{row["key"]} has no {metric}. It has {", ".join(row["metrics"])}.')
    values.setdefault(row['name'], []).append(row['metrics'][metric])
  return values


def table(rows: Sequence[Mapping], metrics: Mapping[str, str],
          references: Mapping[str, tuple[str, float]] | None = None) -> str:
  """A table in Markdown: a row a variant, and one for each reference."""
  found = {metric: by_variant(rows, metric) for metric in metrics}
  names = list(next(iter(found.values())))
  head = ['model']
  for metric, label in metrics.items():
    head += [label, f'minus {names[0]}{" (points)" if _percent(metric) else ""}']
  lines = [head + ['seeds'], ['---'] * (len(head) + 1)]
  for name in names:
    cells = [name]
    for metric, values in found.items():
      cells.append(_words(mean(values[name]), '.1%' if _percent(metric) else '#.4g'))
      cells.append(_words(difference(values[name], values[names[0]]), '+z.1f' if _percent(metric) else '+z.3f',
                          100 if _percent(metric) else 1) if name != names[0] else '')
    lines.append(cells + [str(len(next(iter(found.values()))[name]))])
  for metric, (name, value) in (references or {}).items():
    cells = [cell for each in metrics for cell in (format(value, '#.4g') if each == metric else '', '')]
    lines.append([name, *cells, ''])
  widths = [max(len(line[column]) for line in lines) for column in range(len(head) + 1)]
  return '\n'.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines)


def source(results: Mapping) -> str:
  """Where the numbers come from, in a sentence."""
  rows = results['runs']
  each = lambda key: ' and '.join(dict.fromkeys(row[key] for row in rows))
  return (f'`{results["command"]}`, commit {each("commit")}, {each("machine")}, Python {each("python")}, '
          f'jax {each("jax")}; mean over seeds and its {LEVEL:.0%} t interval, differences with Welch\'s.')


def draw(rows: Sequence[Mapping], metrics: Mapping[str, str],
         references: Mapping[str, tuple[str, float]] | None = None) -> plt.Figure:
  """A panel a metric: a dot a run, a square at the mean of each variant, a bar over its interval."""
  names = list(by_variant(rows, next(iter(metrics))))
  with style.theme('light'):
    figure, panels = plt.subplots(1, len(metrics), figsize=(3 + 4 * len(metrics), 0.55 * len(names) + 1.4), sharey=True,
                                  squeeze=False, layout='constrained')
    for axes, (metric, label) in zip(panels[0], metrics.items()):
      for row, (values, color) in enumerate(zip(by_variant(rows, metric).values(), style.depths(len(names)))):
        found = mean(values)
        axes.plot(values, [row + 0.18] * len(values), 'o', color=color, alpha=0.5, markersize=5)
        if found.low is not None:
          axes.plot([found.low, found.high], [row - 0.1] * 2, '-', color=color, linewidth=3, solid_capstyle='butt')
        axes.plot(found.center, row - 0.1, 's', color=color, markersize=7)
      if metric in (references or {}):
        name, value = references[metric]
        axes.axvline(value, linestyle='--', color='gray', linewidth=1)
        right = value > sum(axes.get_xlim()) / 2  # then the name stands on the other side, where there is room
        axes.annotate(name, (value, -0.45), textcoords='offset points', xytext=(-4 if right else 4, 0), color='gray',
                      horizontalalignment='right' if right else 'left')
      axes.set_xlabel(label)
      if _percent(metric):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.6)
    figure.supxlabel('dots: seeds; square and bar: their mean and its 95% t interval', fontsize=9)
  return figure


def show(study: runner.Study) -> None:
  """Prints the table of a study's results and draws its figure.

  Raises:
    ConfigError: it has no results, or says nothing of how its runs compare.
  """
  results = study.results() or dict(runs=[])
  done = {row['key']: row for row in results['runs']}
  # The first variant is the first one also where a run of another has ended before its own.
  variants = list(dict.fromkeys(run.name for run in study.runs))
  rows = [done[run.key] for run in sorted(study.runs, key=lambda run: variants.index(run.name)) if run.key in done]
  if not study.metrics:
    raise ConfigError(f'{study.folder.name} is not compared: its sweep.py names no METRICS, '
                      '{key of metrics.jsonl: label}.')
  if not rows:
    raise ConfigError(f'{study.folder.name} has no results yet: run python -m experiments.runner {study.folder.name}.')
  print(f'\n{table(rows, study.metrics)}\n\n{source({**results, "runs": rows})}\n')
  save(draw(rows, study.metrics), study.folder / 'figure.png')


def save(figure: plt.Figure, path: pathlib.Path) -> None:
  """Writes a figure, and says where."""
  figure.savefig(path, dpi=120)
  plt.close(figure)
  print(f'Figure:  {runner.from_root(path)}')


def _percent(metric):
  return metric.endswith('accuracy')


def _words(found, form, factor=1):
  low_high = '' if found.low is None else f' ({found.low * factor:{form}} to {found.high * factor:{form}})'
  return f'{found.center * factor:{form}}{low_high}'


def command() -> None:
  """The command."""
  flags = command_line.Parser('experiments.compare', __doc__, usage='STUDY')
  flags.add_argument('study', metavar='STUDY', help='a folder with sweep.py, or the name of one in experiments/')
  show(runner.find(flags.parse().study))


if __name__ == '__main__':
  command_line.in_one_sentence(command)
