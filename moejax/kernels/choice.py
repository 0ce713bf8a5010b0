"""What an implementation of the kernels is, and its choice: the requested one, or the fastest for target and shapes."""
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

from moejax.kernels.target import Target, target


class Shape(NamedTuple):
  """A grouped matmul: `rows` of width `inner`, in `groups` with a matrix [inner, outer] each."""
  rows: int
  groups: int
  inner: int
  outer: int
  dtype: jax.typing.DTypeLike


class BlockKernels(NamedTuple):
  """A fused expert block; arguments and results as in `xla`."""
  forward: Callable[..., tuple]
  backward: Callable[..., tuple]


class Implementation(NamedTuple):
  """One way to compute a grouped matmul, forward and backward.

  Attributes:
    matmul: `(x [M,D], w [E,D,F], group_sizes [E], transpose=False) -> [M,F]`; transposed, `x [M,F] -> [M,D]`.
    weight_gradient: `(x [M,D], dy [M,F], group_sizes [E]) -> <float32>[E,D,F]`.
    limit: one sentence on why the target cannot run the shape, or None if it can.
    row_multiple: group sizes must be positive multiples of this (see `padding`); 1: any size.
    up: `(x, wi, wg | None, group_sizes, activation) -> (hidden [M,F], zi [M,F], zg [M,F] | None)`: an expert's first
      matmul and its activation in one pass; None: composed of `matmul` and XLA.
    block: the whole expert block fused; None: composed of the others.
  """
  matmul: Callable[..., jax.Array]
  weight_gradient: Callable[..., jax.Array]
  limit: Callable[[Target, Shape], str | None] = lambda target, shape: None
  row_multiple: int = 1
  up: Callable[..., tuple] | None = None
  block: BlockKernels | None = None


Name = Literal['reference', 'xla', 'ragged_dot', 'pallas_tpu', 'pallas_gpu', 'tokamax']

# Modules with an IMPLEMENTATION, imported lazily; of several, the first without a limit is used.
MODULES: dict[str, tuple[str, ...]] = {
    'reference': ('reference',),
    'xla': ('xla',),
    'ragged_dot': ('ragged_dot',),
    'pallas_tpu': ('pallas_tpu',),
    'pallas_gpu': ('hopper', 'triton'),
    'tokamax': ('tokamax',),
}
assert set(MODULES) == set(get_args(Name))

# Fastest first.
PREFERRED: dict[str, tuple[Name, ...]] = {
    'cpu': ('xla',),
    'gpu': ('pallas_gpu', 'ragged_dot'),
    'tpu': ('pallas_tpu', 'ragged_dot'),
}

REASONS = {
    'reference': 'every row times every matrix, in float32: E times the work, for comparison only',
    'xla': 'loops over blocks of rows of one expert, in plain JAX: made for CPUs, runs anywhere',
    'ragged_dot': 'jax.lax.ragged_dot: native on TPU; elsewhere XLA may multiply every row with every matrix',
    'pallas_tpu': 'kernels for TPU v4 to v6e',
    'pallas_gpu': 'kernels for NVIDIA: Mosaic GPU on Hopper, Triton on older GPUs and for float32',
    'tokamax': "tokamax's ragged_dot, with the kernel it picks",
}


class CannotRun(ValueError):
  """The requested implementation cannot run these shapes here; the message says why, and which one can."""


def implementations(name: Name) -> list[Implementation]:
  """The implementations called `name`. Raises ValueError if there is no such name."""
  if name not in MODULES:
    raise ValueError(f'Unknown implementation {name!r} of the grouped matmul. Allowed: {", ".join(sorted(MODULES))}.')
  return [importlib.import_module(f'moejax.kernels.{module}').IMPLEMENTATION for module in MODULES[name]]


def choose(name: Name | None, *shapes: Shape) -> Implementation:
  """The implementation `name`, or by default the fastest, that runs all `shapes` on the current target.

  Raises:
    CannotRun: the requested implementation cannot run them.
  """
  where = target()
  if name is not None:
    able, limits = _able(name, where, shapes)
    if able is None:
      raise CannotRun(' '.join(limits))
    return able
  for name in PREFERRED[where.platform]:
    able, _ = _able(name, where, shapes)
    if able is not None:
      return able
  return choose('xla', *shapes)


def explain(*shapes: Shape, implementation: Name | None = None) -> str:
  """Explains in a few lines which implementation runs `shapes` here, why, and which would be faster.

  Args:
    shapes: all matmuls that one implementation must run.
    implementation: the requested one; None: the choice by platform and shape.
  """
  where = target()
  lines = [f'On {where.platform} ({where.kind}):']
  preferred = PREFERRED[where.platform]
  ranked: list[Any] = [*preferred, *(name for name in MODULES if name not in preferred)]
  chosen = implementation
  for rank, name in enumerate(ranked):
    able, limits = _able(name, where, shapes)
    if able is None:
      faster = 'would be faster, but cannot run: ' if name in preferred and chosen is None else 'cannot run: '
      lines.append(f'  {name}: {faster}{" ".join(limits)}')
      continue
    if chosen is None:
      chosen = name
    is_faster = name in preferred and rank < ranked.index(chosen)
    used = 'runs: ' if name == chosen else 'is faster: ' if is_faster else 'could run: '
    lines.append(f'  {name}: {used}{REASONS[name]}')
  return '\n'.join(lines)


def _able(name: Name, where: Target, shapes: tuple[Shape, ...]) -> tuple[Implementation | None, list[str]]:
  # The first of the name's implementations that runs all shapes, or their limits.
  limits = []
  for implementation in implementations(name):
    found = [limit for shape in shapes if (limit := implementation.limit(where, shape))]
    if not found:
      return implementation, []
    limits.append(found[0])
  return None, limits
