"""evaluations.jsonl in the folder of a run: what was measured from its checkpoints, one JSON object a line.

    {"step": 2000, "overrides": {"model.moe.router.select.k": 1}, "metrics": {"test/accuracy": 0.96}}
"""
import json
import math
from pathlib import Path

FILE = 'evaluations.jsonl'


def append(workdir: str | Path, step: int, overrides: dict, metrics: dict[str, float]) -> Path:
  """Adds a line; returns the path of the file."""
  path = Path(workdir) / FILE
  # NaN and infinity are no JSON.
  finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps({'step': step, 'overrides': overrides, 'metrics': finite}) + '\n')
  return path


def read(workdir: str | Path) -> list[dict]:
  """All lines in order; [] if there are none."""
  path = Path(workdir) / FILE
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
