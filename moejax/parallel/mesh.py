"""The device mesh. It always exists: on a laptop it has one device, and every axis has size 1.

    data     shards the batch; parameters are replicated
    fsdp     shards the batch, and parameters and optimizer state
    expert   shards the batch, and the experts, to which tokens are sent
    model    shards attention heads, hidden units and vocabulary (tensor parallelism)
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from moejax.config import ConfigError, call, config_path
from moejax.ranges import Count

AXES = ('data', 'fsdp', 'expert', 'model')

Size = Literal[-1] | Count


def build(config: Mapping, where: str = 'config.mesh', devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """A mesh with the axes of `AXES` over `devices` (all of them by default).

  `config` gives sizes, e.g. `dict(data=-1, expert=4)`; one axis may be -1, to use all remaining devices.

  Raises:
    ConfigError: unknown axis, more than one -1, or sizes whose product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  return call(_mesh, config, where, devices=devices)


def _mesh(*, devices: Sequence, data: Size = -1, fsdp: Size = 1, expert: Size = 1, model: Size = 1):
  """The sizes of the axes.

  Config:
    data: devices that shard the batch and replicate parameters; -1: all devices the other axes leave.
    fsdp: devices that shard the batch and, by config.sharding.zero, parameters and optimizer state; or -1.
    expert: devices that shard the batch and the experts; or -1.
    model: devices that shard heads, hidden units and vocabulary; or -1.
  """
  sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, expert, model)))
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1:
    raise ConfigError(f': only one axis may be -1, not {" and ".join(free)}.')
  if free and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    raise ConfigError(f': {_spell(sizes)} do not make {len(devices)} devices: '
                      f'{_nearest(sizes, free, len(devices))}.')
  return jax.sharding.Mesh(np.asarray(devices).reshape([sizes[a] for a in AXES]), AXES,
                           axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _nearest(sizes: dict[str, int], free: list[str], count: int) -> str:
  """The smallest change of a single axis that makes `count` devices."""
  fixed = {axis: size for axis, size in sizes.items() if axis not in free}
  changes = []
  for axis, size in fixed.items():
    others = math.prod(fixed.values()) // size
    if count % others == 0:
      room = count // others
      sizes_that_fit = [n for n in range(1, room + 1) if room % n == 0] if free else [room]
      below = [n for n in sizes_that_fit if n < size][-1:]
      above = [n for n in sizes_that_fit if n > size][:1]
      distance = min(max(n, size) / min(n, size) for n in below + above)
      changes.append((distance, f'{config_path()}.{axis} = {" or ".join(map(str, below + above))} would'))
  if changes:
    return min(changes)[1]
  at_most = f', or divide it where {config_path()}.{free[0]} is left at -1' if free else ''
  return f'the product must be {count}{at_most}'


def _spell(sizes):
  return ' x '.join(f'{axis}={size}' for axis, size in sizes.items())
