"""Files of JSON objects, one per line: a broken line costs no other."""
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax import buckets


def read(path: str | Path, fits: Callable[[dict], bool] = lambda row: True,
         say: Callable[[str], None] = print) -> list[dict[str, Any]]:
  """The objects in order; [] if there is no file.

  Skips a line that a kill truncated, that is not JSON in UTF-8, or whose value is not an object that `fits`.

  Args:
    path: of the file.
    fits: whether an object has the expected form.
    say: receives one message about all skipped lines, if there are any.
  """
  path = buckets.path(path)
  rows, broken = [], []
  for number, line in enumerate(path.read_bytes().split(b'\n') if path.exists() else [], 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode())
    except (ValueError, RecursionError):
      row = None
    if isinstance(row, dict) and fits(row):
      rows.append(row)
    else:
      broken.append(number)
  if broken:
    more = f' (and {len(broken) - 1} more)' if len(broken) > 1 else ''
    say(f'{path}: line {broken[0]}{more} cannot be read and is skipped; all others are used.')
  return rows


def append(path: str | Path, row: dict[str, Any]) -> None:
  """Appends a line; a truncated last line stays a line of its own."""
  if buckets.is_address(path):
    buckets.append(buckets.path(path), line(row).encode())
    return
  with open(path, 'ab+') as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      file.write(b'' if file.read() == b'\n' else b'\n')
    file.write(line(row).encode())


def line(row: dict[str, Any]) -> str:
  """The line of `row`; NaN and infinity, which JSON lacks, become null."""
  return json.dumps(_finite(row), allow_nan=False) + '\n'


def _finite(value):
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
