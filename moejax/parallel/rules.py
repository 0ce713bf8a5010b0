"""Sharding rules: tables from logical axis names to mesh axes.

Parameters and activations name their dimensions ('expert', 'embed', 'mlp'); this file maps the names to a mesh.
"""
import contextlib
import contextvars
import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.functional import Tree, flatten, unflatten

# The mesh axes that shard the batch.
BATCH_AXES = ('data', 'fsdp', 'expert')

Table = dict[str, str | tuple[str, ...]]

# Tensor and expert parallelism. If there are fewer experts than devices of `expert`, their hidden units are sharded.
_SPLIT: Table = {
    'expert': 'expert',
    'expert_mlp': ('expert', 'model'),
    'mlp': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'vocab': 'model',
}
# Experts are sharded over `expert` already; this shards all other parameters over it too.
_SPLIT_OVER_DATA: Table = {**_SPLIT, 'embed': ('fsdp', 'expert'), 'expert_embed': 'fsdp'}
_ACTIVATIONS: Table = {
    'batch': BATCH_AXES,
    'group': BATCH_AXES,
    'expert': 'expert',
    'slot': ('data', 'fsdp'),  # the slots of an expert's buffer, one block for each shard of the groups
    'mlp': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'vocab': 'model',
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """Tables from logical axis names to mesh axes.

  Attributes:
    parameters: for parameters.
    gradients: for gradients.
    optimizer: for the optimizer's state and moving averages.
    activations: for `constrain`.
  """
  parameters: Table
  gradients: Table
  optimizer: Table
  activations: Table


# The stages of ZeRO (arXiv:1910.02054, section 5); each shards one more kind of array.
Zero = Literal[0, 1, 2, 3]
_STAGES = {
    0: Rules(_SPLIT, _SPLIT, _SPLIT, _ACTIVATIONS),
    1: Rules(_SPLIT, _SPLIT, _SPLIT_OVER_DATA, _ACTIVATIONS),
    2: Rules(_SPLIT, _SPLIT_OVER_DATA, _SPLIT_OVER_DATA, _ACTIVATIONS),
    3: Rules(_SPLIT_OVER_DATA, _SPLIT_OVER_DATA, _SPLIT_OVER_DATA, _ACTIVATIONS),
}


def build(*, zero: Zero = 3, sequence: bool = False) -> Rules:
  """config.sharding.

  Args:
    zero: what is sharded over the mesh axes `fsdp` and, outside of experts, `expert`. 0: nothing; 1: the optimizer's
      state; 2: gradients too; 3: parameters too, which are gathered layer by layer.
    sequence: shards the tokens of long inputs over the mesh axis `model` between attention and feed-forwards (sequence
      parallelism, arXiv:2205.05198, section 4.2.2).
  """
  rules = _STAGES[zero]
  if sequence:
    rules = dataclasses.replace(rules, activations={**rules.activations, 'sequence': 'model'})
  return rules


_active: contextvars.ContextVar[tuple[Mesh | None, Rules]] = contextvars.ContextVar('mesh', default=(None, build()))


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Rules = build()):
  """Within this context `constrain` uses `mesh`; None: it does nothing, as needed inside `jax.shard_map`."""
  token = _active.set((mesh, rules))
  try:
    yield mesh
  finally:
    _active.reset(token)


def active() -> Mesh | None:
  """The active mesh, or None."""
  return _active.get()[0]


def parameter_spec(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
  """The sharding of a parameter on the active mesh."""
  mesh, rules = _active.get()
  if mesh is None:
    raise ValueError('No mesh is in use: parameters lie on one device.')
  return _spec(mesh, rules.parameters, axes, shape)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """`x` with a sharding constraint on the active mesh; unchanged if there is none."""
  mesh, rules = _active.get()
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(mesh, rules.activations, axes, x.shape)))


def activation_spec(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
  """The sharding that `constrain` gives an activation on the active mesh."""
  mesh, rules = _active.get()
  if mesh is None:
    raise ValueError('No mesh is in use: activations lie on one device.')
  return _spec(mesh, rules.activations, axes, shape)


def shardings(mesh: Mesh, axes: Tree, shapes: Tree, table: Table = build().parameters) -> Tree:
  """A `NamedSharding` for every parameter: `axes` are its logical names, `shapes` anything with `.shape`.

  If its mesh axes do not divide a dimension, it is sharded over the longest prefix of them that does.
  """
  flat_axes = flatten(axes)
  return unflatten({path: NamedSharding(mesh, _spec(mesh, table, flat_axes[path], leaf.shape))
                    for path, leaf in flatten(shapes).items()})


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading dimension sharded over all axes that shard the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """Number of shards of `batch_sharding`, which must divide the batch size."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def bytes_on_one_device(tree: Any) -> int:
  """Bytes on one device of `jax.ShapeDtypeStruct`s with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
             for leaf in jax.tree.leaves(tree))


def _spec(mesh: Mesh, table: Table, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
  if len(axes) != len(shape):
    raise ValueError(f'{len(axes)} axis names {axes} for an array of shape {shape}.')
  used: set[str] = set()
  spec: list[Any] = []
  for name, size in zip(axes, shape):
    named = () if name is None else table.get(name, ())
    targets = tuple(t for t in ((named,) if isinstance(named, str) else named) if t not in used)
    targets = tuple(t for t in targets if mesh.shape[t] > 1)
    while targets and size % math.prod(mesh.shape[t] for t in targets):
      targets = targets[:-1]
    if not targets:
      spec.append(None)
      continue
    used.update(targets)
    first, *others = targets
    spec.append(targets if others else first)
  return PartitionSpec(*spec)
