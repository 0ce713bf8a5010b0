"""Which implementation runs: the one that was asked for, or the fastest that can."""
import importlib
from typing import Any, Literal, get_args

from moejax.kernels.implementation import Implementation, Shape
from moejax.kernels.target import Target, target

Name = Literal['reference', 'xla', 'ragged_dot', 'pallas_tpu', 'pallas_gpu', 'tokamax']

# Modules with an IMPLEMENTATION, imported when they are looked at; of several, the first without a limit.
MODULES: dict[str, tuple[str, ...]] = {
    'reference': ('reference',),
    'xla': ('xla_block',),
    'ragged_dot': ('ragged_dot',),
    'pallas_tpu': ('pallas_tpu',),
    'pallas_gpu': ('hopper', 'triton'),
    'tokamax': ('tokamax',),
}
assert set(MODULES) == set(get_args(Name))

# The fastest first.
PREFERRED: dict[str, tuple[Name, ...]] = {
    'cpu': ('xla',),
    'gpu': ('pallas_gpu', 'ragged_dot'),
    'tpu': ('pallas_tpu', 'ragged_dot'),
}

REASONS = {
    'reference': 'every row times every matrix, in float32: E times the work, to compare others with',
    'xla': 'loops over blocks of rows of one expert, in plain JAX: made for CPUs, runs anywhere',
    'ragged_dot': 'jax.lax.ragged_dot: native on TPU; elsewhere XLA may multiply every row with every matrix',
    'pallas_tpu': 'kernels for TPU v4 to v6e',
    'pallas_gpu': 'kernels for NVIDIA: Mosaic GPU on Hopper, Triton before it and for float32',
    'tokamax': "tokamax's ragged_dot, with the kernel that it picks",
}


class CannotRun(ValueError):
  """An implementation that was asked for does not run such shapes here; says why, and which would."""


def implementations(name: Name) -> list[Implementation]:
  """What `name` stands for. Raises ValueError where there is no such name."""
  if name not in MODULES:
    raise ValueError(f'There is no implementation {name!r} of the grouped matmul; there are {", ".join(sorted(MODULES))}.')
  return [importlib.import_module(f'moejax.kernels.{module}').IMPLEMENTATION for module in MODULES[name]]


def choose(name: Name | None, *shapes: Shape) -> Implementation:
  """The implementation `name`, or the fastest, that runs all `shapes` on the present target.

  Raises:
    CannotRun: the one that was asked for cannot.
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
  """Which implementation runs `shapes` here, why, and what would be faster: a few lines of text.

  Args:
    shapes: of all matmuls that one implementation is to run.
    implementation: as asked for; None for the choice by platform and shape.
  """
  where = target()
  lines = [f'On {where.platform} ({where.kind}):']
  preferred = PREFERRED[where.platform]
  ranked: list[Any] = [*preferred, *(name for name in MODULES if name not in preferred)]
  chosen = implementation
  for rank, name in enumerate(ranked):
    able, limits = _able(name, where, shapes)
    if able is None:
      faster = 'would be faster, but cannot: ' if name in preferred and chosen is None else 'cannot: '
      lines.append(f'  {name}: {faster}{" ".join(limits)}')
      continue
    if chosen is None:
      chosen = name
    used = 'runs: ' if name == chosen else 'is faster: ' if name in preferred and rank < ranked.index(chosen) else 'could: '
    lines.append(f'  {name}: {used}{REASONS[name]}')
  return '\n'.join(lines)


def _able(name: Name, where: Target, shapes: tuple[Shape, ...]) -> tuple[Implementation | None, list[str]]:
  # The first of the name's implementations that runs all shapes, or what limits them.
  limits = []
  for implementation in implementations(name):
    found = [limit for shape in shapes if (limit := implementation.limit(where, shape))]
    if not found:
      return implementation, []
    limits.append(found[0])
  return None, limits
