"""The logged metrics of a run, as series over its steps."""
import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Series:
  """One metric over training.

  Attributes:
    steps: <int64>[N] increasing.
    values: <float64>[N], or [N,E] for the load of a layer's experts; nan where not finite.
  """
  steps: np.ndarray
  values: np.ndarray


def series(rows: Iterable[dict]) -> dict[str, Series]:
  """`{metric: Series}` from the rows of metrics.jsonl; of two rows of one step, the later counts."""
  columns: dict[str, dict[int, object]] = {}
  for row in rows:
    for name, value in row.items():
      if name != 'step':
        columns.setdefault(name, {})[row['step']] = value
  return {name: _series(column) for name, column in columns.items()}


def last(rows: Iterable[dict], prefix: str) -> dict[str, float]:
  """The latest value of every metric that starts with `prefix`, keyed without the prefix."""
  return {name[len(prefix):]: float(one.values[-1]) for name, one in series(rows).items()
          if name.startswith(prefix) and one.values.ndim == 1}


def router_layers(all_series: dict[str, Series], metric: str) -> dict[str, Series]:
  """`{layer: Series}` of `router/<layer>/<metric>`, first layer to last."""
  found = {}
  for name, one in all_series.items():
    room, _, rest = name.partition('/')
    layer, _, of = rest.rpartition('/')
    if room == 'router' and of == metric:
      found[layer] = one
  return {layer: found[layer] for layer in sorted(found, key=depth_order)}


def depth_order(layer: str) -> tuple[bool, str]:
  """Sorts layer names: the encoder before the decoder, then by depth (names end in two digits)."""
  return not layer.startswith('encoder'), layer


def _series(column: dict[int, object]) -> Series:
  steps = sorted(column)
  return Series(np.asarray(steps), np.asarray([column[step] for step in steps], np.float64))
