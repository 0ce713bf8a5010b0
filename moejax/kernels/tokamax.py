"""Grouped matmul by `tokamax.ragged_dot_general`, which picks one of tokamax's kernels, if tokamax is installed.

`pip install tokamax`; it needs Python 3.12 and JAX 0.11.1. For comparison; never the default.
"""
import importlib.util
from typing import Any


from moejax.kernels.choice import Shape
from moejax.kernels.ragged_dot import by_ragged_dot, full_precision
from moejax.kernels.target import Target


def limit(target: Target, shape: Shape) -> str | None:
  """One sentence on why the target cannot run the shape, or None if it can."""
  del target, shape  # tokamax falls back to XLA.
  if importlib.util.find_spec('tokamax') is None:
    return 'tokamax is not installed: `pip install tokamax` (Python 3.12 and JAX 0.11.1 or newer), or use ragged_dot.'
  return None


def _ragged_dot(a, b, group_sizes, dimensions, dtype):
  tokamax: Any = importlib.import_module('tokamax')
  return tokamax.ragged_dot_general(a, b, group_sizes, dimensions, precision=full_precision(a.dtype),
                                    preferred_element_type=dtype)


IMPLEMENTATION = by_ragged_dot(_ragged_dot, limit=limit)
