"""Logical axis names to mesh axes: the one table that says how arrays are sharded.

Parameters and activations name their dimensions ('expert', 'embed', 'mlp'); this file decides what that means on a mesh.
"""
import contextlib
import contextvars

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.functional import Tree, flatten, unflatten

# The dimensions that examples are spread over.
BATCH_AXES = ('data', 'fsdp', 'expert')

PARAMETER_RULES = {
    'expert': 'expert',
    'embed': 'fsdp',
    'mlp': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'vocab': 'model',
}
ACTIVATION_RULES = {
    'batch': BATCH_AXES,
    'group': BATCH_AXES,
    'expert': 'expert',
    'slot': ('data', 'fsdp'),  # the slots of an expert's buffer, one block for each shard of the groups
    'mlp': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'vocab': 'model',
}

_active: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar('mesh', default=None)


@contextlib.contextmanager
def use(mesh: Mesh):
  """Within this context `constrain` constrains to `mesh`."""
  token = _active.set(mesh)
  try:
    yield mesh
  finally:
    _active.reset(token)


def active() -> Mesh | None:
  """The mesh in use, or None."""
  return _active.get()


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """`x` with a sharding constraint on the active mesh; `x` itself where no mesh is active."""
  mesh = _active.get()
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(mesh, ACTIVATION_RULES, axes, x.shape)))


def shardings(mesh: Mesh, axes: Tree, shapes: Tree) -> Tree:
  """A `NamedSharding` for every parameter: `axes` are its logical names, `shapes` anything with `.shape`.

  A dimension that its mesh axis does not divide is left whole.
  """
  flat_axes = flatten(axes)
  return unflatten({path: NamedSharding(mesh, _spec(mesh, PARAMETER_RULES, flat_axes[path], leaf.shape))
                    for path, leaf in flatten(shapes).items()})


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading dimension spread over all axes that share the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """How many shards `batch_sharding` makes; the batch size must be a multiple."""
  size = 1
  for axis in BATCH_AXES:
    size *= mesh.shape[axis]
  return size


def _spec(mesh: Mesh, rules: dict, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
  if len(axes) != len(shape):
    raise ValueError(f'{len(axes)} axis names {axes} for an array of shape {shape}.')
  used: set[str] = set()
  spec = []
  for name, size in zip(axes, shape):
    targets = rules.get(name, ())
    targets = tuple(t for t in ((targets,) if isinstance(targets, str) else targets) if t not in used)
    shards = 1
    for target in targets:
      shards *= mesh.shape[target]
    if shards == 1 or size % shards:
      spec.append(None)
      continue
    used.update(targets)
    spec.append(targets if len(targets) > 1 else targets[0])
  return PartitionSpec(*spec)
