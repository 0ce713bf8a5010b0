"""evaluations.jsonl in the folder of a run: metrics measured from its checkpoints, one JSON object per line.

    {"step": 2000, "overrides": {"model.moe.router.select.k": 1}, "metrics": {"test/accuracy": 0.96}}
"""
import json
from collections.abc import Callable
from pathlib import Path

from moejax import buckets, json_lines

FILE = 'evaluations.jsonl'


def append(workdir: str | Path, step: int, overrides: dict, metrics: dict[str, float]) -> Path:
  """Appends a line; returns the path of the file."""
  path = buckets.path(workdir) / FILE
  json_lines.append(path, {'step': step, 'overrides': overrides, 'metrics': metrics})
  return path


def read(workdir: str | Path, say: Callable[[str], None] = print) -> list[dict]:
  """All lines in order; [] if there are none. `say` reports lines that cannot be read."""
  return json_lines.read(buckets.path(workdir) / FILE, _is_evaluation, say)


def steps(workdir: str | Path, overrides: dict, say: Callable[[str], None] = print) -> set[int]:
  """The steps that were measured with these overrides."""
  as_read = json.loads(json_lines.line(overrides))  # JSON has no tuples
  return {row['step'] for row in read(workdir, say) if row['overrides'] == as_read}


def _is_evaluation(row):
  metrics = row.get('metrics')
  return (type(row.get('step')) is int and isinstance(row.get('overrides'), dict) and isinstance(metrics, dict) and
          all(value is None or isinstance(value, (int, float)) for value in metrics.values()))
