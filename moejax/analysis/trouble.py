"""Trouble in training and its remedies: collapsed routers, skipped batches, rollbacks."""
import numpy as np

from moejax.analysis import history, page


def remarks(series: dict[str, history.Series]) -> list[str]:
  """Sentences for the head of the report; none for a healthy run."""
  said = [f'{layer}: the router collapsed at step {begin}: {share:.0%} of the choices selected expert {expert}. '
          + ('It has not recovered.' if end is None else f'It had recovered by step {end}.')
          for layer, begin, end, expert, share in collapses(series)]
  skipped, rollbacks, lost = (_last(series, f'recovery/{name}') for name in ('skipped', 'rollbacks', 'lost'))
  if skipped:
    said.append(f'Batches skipped because their loss or gradient was not finite or spiked: {skipped}. '
                f'Rollbacks: {rollbacks}. Steps lost by rollbacks: {lost}.')
  return said


def section(series: dict[str, history.Series]) -> str:
  """The section on trouble, with tables."""
  parts = []
  found = collapses(series)
  if found:
    parts.append(page.paragraph('A router has collapsed if nearly all tokens choose the same expert in three '
                                'consecutive logged rows (config.recovery.collapse).'))
    parts.append(page.table(['layer', 'from step', 'to step', 'expert', 'share of choices'],
                            [[layer, begin, 'the end' if end is None else end, expert, share]
                             for layer, begin, end, expert, share in found]))
  changes = _changes(series)
  if changes:
    parts.append(page.paragraph('Skipped batches and rollbacks to a checkpoint, at the first row logged after them '
                                '(config.recovery). Neither rewinds the step or the data.'))
    parts.append(page.table(['step', 'skipped so far', 'rollbacks so far', 'steps lost so far'], changes))
  return ''.join(parts) or page.paragraph('None: no router collapsed, and no batch was skipped.')


def collapses(series: dict[str, history.Series]) -> list[tuple[str, int, int | None, int, float]]:
  """(layer, first step, step of recovery or None, expert, its share of the choices) of every alarm."""
  found = []
  for name, alarm in series.items():
    if not name.startswith('alarm/collapse/'):
      continue
    layer = name.removeprefix('alarm/collapse/')
    load = series[f'router/{layer}/load']
    on = np.concatenate([[0], alarm.values, [0]]) > 0
    for begin, end in zip(np.flatnonzero(~on[:-1] & on[1:]), np.flatnonzero(on[:-1] & ~on[1:])):
      shares = load.values[list(load.steps).index(alarm.steps[begin])]
      found.append((layer, int(alarm.steps[begin]), int(alarm.steps[end]) if end < len(alarm.steps) else None,
                    int(np.nanargmax(shares)), float(np.nanmax(shares))))
  return sorted(found, key=lambda one: one[1])


def _changes(series):
  names = [f'recovery/{name}' for name in ('skipped', 'rollbacks', 'lost')]
  if names[0] not in series:
    return []
  counts = np.stack([series[name].values for name in names], 1).astype(int)
  before = np.concatenate([np.zeros((1, 3), int), counts[:-1]])
  return [[int(step), *map(int, row)] for step, row, old in zip(series[names[0]].steps, counts, before)
          if (row != old).any()]


def _last(series, name):
  return int(series[name].values[-1]) if name in series else 0
