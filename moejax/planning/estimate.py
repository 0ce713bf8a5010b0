"""Estimates a chip's memory under other settings from one compiled step, by arithmetic instead of compilation.

    estimate = Estimator(setup, found.memory)
    estimate(dataclasses.replace(estimate.now, accumulate=4)) / topology.chip.memory

Parameters, optimizer state, gradients and the batch follow exactly from shardings. The rest of the compiled step, its
working set, is modelled as the weights of the largest layer with their gradients, gathered over `fsdp`, plus a part
proportional to the examples of a device's microbatch. Three quarters of that part (heads, hidden units, vocabulary) are
sharded over `model`.
"""
import dataclasses
import functools
import math
import re
from typing import Any

import jax

from moejax.config_files import override
from moejax.functional import flatten
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.planning import memory as memory_lib
from moejax.training import step as step_lib
from moejax.training.setup import Setup, prepare
from moejax.training.spanning_groups import sides

# Factor by which a step may exceed its estimate; tests/planning/test_estimate.py compares with compiled steps.
MARGIN = 1.25
# Bytes of a gathered weight, in bfloat16, plus its gradient before it is sharded, in float32.
_GATHERED = 2 + 4
_DEFAULT_MESH = dict(data=-1, fsdp=1, expert=1, model=1)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings that change the memory of a step but (except `groups`) not its result.

  Attributes:
    mesh: sizes of its axes, in the order of `parallel.mesh.AXES`.
    accumulate: number of microbatches.
    zero: as in config.sharding.
    full_remat: save only the inputs of blocks, in all stacks; False: as each stack's config says.
    groups: 'sequence' for routers whose one-hot matrices span the whole batch; None: as the config says.
  """
  mesh: tuple[int, ...]
  accumulate: int
  zero: rules.Zero
  full_remat: bool = False
  groups: str | None = None

  @property
  def axes(self) -> dict[str, int]:
    """Sizes of the mesh by name."""
    return dict(zip(mesh_lib.AXES, self.mesh))

  @property
  def shards(self) -> int:
    """Number of shards of the batch."""
    return math.prod(self.axes[axis] for axis in rules.BATCH_AXES)


def of_setup(setup: Setup) -> Settings:
  """The settings of a setup."""
  return Settings(tuple(setup.mesh.shape[axis] for axis in mesh_lib.AXES), setup.training.accumulate,
                  setup.config.sharding.zero)


def overrides(config: Any, settings: Settings) -> dict[str, int | str]:
  """`{config key: value}` to set for `settings`; an axis that the config leaves at -1 adapts."""
  wanted: dict[str, int | str] = {f'mesh.{axis}': size for axis, size in settings.axes.items()}
  found = {f'mesh.{axis}': size for axis, size in (_DEFAULT_MESH | dict(config.mesh)).items()}
  wanted |= {'training.accumulate': settings.accumulate, 'sharding.zero': settings.zero}
  found |= {'training.accumulate': config.training.accumulate, 'sharding.zero': config.sharding.zero}
  for path, side in sides(config).items():
    if settings.full_remat:
      wanted[f'{path}.remat'], found[f'{path}.remat'] = 'full', side.get('remat', 'none')
    if settings.groups and one_hot_of_batch(side):
      wanted[f'{path}.moe.group'], found[f'{path}.moe.group'] = settings.groups, 'batch'
  return {key: value for key, value in wanted.items() if found[key] not in (value, -1)}


def one_hot_of_batch(side: Any) -> bool:
  """Whether a stack uses one-hot matrices that grow with the square of the batch."""
  moe = side.get('moe') or {}
  return (moe.get('dispatch') or {}).get('name') == 'einsum' and moe.get('group', 'batch') == 'batch'


class Estimator:
  """Bytes on one chip as a function of settings, calibrated to `memory` for the settings of `setup`."""

  def __init__(self, setup: Setup, memory: memory_lib.Memory):
    self.setup, self.memory, self.now = setup, memory, of_setup(setup)
    self._shapes = jax.eval_shape(step_lib.init_function(setup))
    self._exact, self._whole_layer = functools.cache(self._exact), functools.cache(self._whole_layer)
    self._batch_size = next(iter(setup.pipeline.batch_spec().values())).shape[0]
    self._squared = any(map(one_hot_of_batch, sides(setup.config).values()))
    rest = max(0, memory.temporaries - memory.activations - _sums(self.now) * memory.gradients)
    self._layer = min(rest, self._whole_layer(self.now.mesh))
    self._examples = rest - self._layer

  def __call__(self, settings: Settings) -> int:
    """Estimates the total memory of a step. The batch must divide evenly over microbatches and shards."""
    if settings == self.now:
      return self.memory.total
    exact, exact_now = self._exact(settings.mesh, settings.zero), self._exact(self.now.mesh, self.now.zero)
    part = {name: getattr(self.memory, name) * exact[name] / max(1, exact_now[name]) for name in exact}
    examples = self._of_device(settings) / self._of_device(self.now)
    working = self._examples * examples
    if self._squared:
      working *= (1 if settings.groups == 'sequence' else self._microbatch(settings)) / self._microbatch(self.now)
    working *= (1 + 3 / settings.axes['model']) / (1 + 3 / self.now.axes['model'])
    kept = self.memory.activations
    if settings.full_remat:
      kept = min(kept, self._kept_by_full)
      working += (self.memory.activations - kept) / self._blocks * examples  # a block at a time, recomputed
    layer = self._layer * self._whole_layer(settings.mesh) / max(1, self._whole_layer(self.now.mesh))
    held = part['parameters'] + part['optimizer'] + part['others'] + part['batch']
    return int(held + _sums(settings) * part['gradients'] + kept * examples + layer + working + self.memory.unaliased)

  def _microbatch(self, settings) -> int:
    return self._batch_size // settings.accumulate

  def _of_device(self, settings) -> float:
    return self._microbatch(settings) / settings.shards

  def _on(self, mesh: tuple[int, ...], zero: rules.Zero) -> Setup:
    # Only shardings are needed, for which a mesh needs no devices.
    return dataclasses.replace(self.setup, mesh=jax.sharding.AbstractMesh(mesh, mesh_lib.AXES),
                               rules=rules.build(zero=zero))

  def _exact(self, mesh, zero) -> dict[str, int]:
    setup = self._on(mesh, zero)
    place = lambda leaf, sharding: leaf.update(sharding=sharding)
    state = jax.tree.map(place, self._shapes, step_lib.state_shardings(setup))
    return memory_lib.held(setup, state, step_lib.abstract_batch(setup))

  def _whole_layer(self, mesh) -> int:
    """Bytes of the largest layer (or of all parameters outside of layers) on a device between gather and reduction."""
    axes, shapes = self.setup.model.axes, self.setup.model.shapes()[0]
    placed = flatten(rules.shardings(self._on(mesh, 0).mesh, axes, shapes, rules.build(zero=0).parameters))
    layers: dict[str, int] = {}
    for path, leaf in flatten(shapes).items():
      repeats = leaf.shape[0] if flatten(axes)[path][0] == 'layers' else 1
      found = re.match(r'(?:.*?/)?blocks/\d+(?:/\d+(?=/))?', path)
      layer = found[0] if found else ''
      layers[layer] = layers.get(layer, 0) + math.prod(placed[path].shard_shape(leaf.shape)) // repeats
    return _GATHERED * max(layers.values())

  @functools.cached_property
  def _kept_by_full(self) -> int:
    keys = overrides(self.setup.config, dataclasses.replace(self.now, full_remat=True))
    setup = prepare(override(self.setup.config, keys), list(self.setup.mesh.devices.ravel()))
    return memory_lib.kept(setup, setup.pipeline.batch_spec())

  @functools.cached_property
  def _blocks(self) -> int:
    return sum(side.get('num_layers', 1) for side in sides(self.setup.config).values())


def _sums(settings: Settings) -> int:
  # Gradients of a microbatch besides their sum.
  return 1 if settings.accumulate == 1 else 2
