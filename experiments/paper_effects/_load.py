"""How evenly experts are loaded in the last step that was logged: metrics of effects."""
import json
import pathlib
import statistics


def heaviest_load(workdir: pathlib.Path) -> float:
  """Tokens of the most loaded expert over an equal share; a mean over layers."""
  return statistics.mean(max(load) * len(load) for load in _loads(workdir))


def load_variation(workdir: pathlib.Path) -> float:
  """Coefficient of variation over experts of their share of the choices; a mean over layers."""
  return statistics.mean(statistics.pstdev(load) / statistics.mean(load) for load in _loads(workdir))


def _loads(workdir: pathlib.Path) -> list[list[float]]:
  newest = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    newest |= {key: value for key, value in json.loads(line).items() if key.endswith('/load')}
  return list(newest.values())
