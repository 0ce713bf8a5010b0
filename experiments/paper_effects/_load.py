"""How evenly experts are loaded in the last step that was logged: metrics of effects."""
import pathlib
import statistics

from moejax import json_lines


def heaviest_load(workdir: pathlib.Path) -> float:
  """Tokens of the most loaded expert over an equal share; a mean over layers."""
  return statistics.mean(max(load) * len(load) for load in _loads(workdir))


def load_variation(workdir: pathlib.Path) -> float:
  """Coefficient of variation over experts of their share of the choices; a mean over layers."""
  return statistics.mean(statistics.pstdev(load) / statistics.mean(load) for load in _loads(workdir))


def _loads(workdir: pathlib.Path) -> list[list[float]]:
  newest = {}
  for row in json_lines.read(workdir / 'metrics.jsonl'):
    newest |= {key: value for key, value in row.items() if key.endswith('/load')}
  return list(newest.values())
