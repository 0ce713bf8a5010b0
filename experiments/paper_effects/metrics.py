"""Metrics of effects that one number of metrics.jsonl does not give."""
import pathlib
import statistics

from moejax import json_lines


def heaviest_load(workdir: pathlib.Path) -> float:
  """Tokens of the most loaded expert over an equal share in the last step that was logged; a mean over layers."""
  return statistics.mean(max(load) * len(load) for load in _loads(workdir))


def load_variation(workdir: pathlib.Path) -> float:
  """Coefficient of variation over experts of their share of the choices in the last step that was logged; a mean over
  layers."""
  return statistics.mean(statistics.pstdev(load) / statistics.mean(load) for load in _loads(workdir))


def text_success(workdir: pathlib.Path) -> float:
  """Share of the text's tokens that are computed: a mean over layers and the last half of training."""
  rows = json_lines.read(workdir / 'metrics.jsonl')
  values = [value for row in rows[len(rows) // 2:] for key, value in row.items() if key.endswith('/text_success')]
  return statistics.mean(values)


def _loads(workdir: pathlib.Path) -> list[list[float]]:
  newest = {}
  for row in json_lines.read(workdir / 'metrics.jsonl'):
    newest |= {key: value for key, value in row.items() if key.endswith('/load')}
  return list(newest.values())
