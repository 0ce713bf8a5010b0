"""Advice for steps that do not fit a chip: settings estimated to fit, or that none do."""
import itertools
import math

import jax

from moejax.config import ConfigError
from moejax.config_files import override
from moejax.functional import expert_paths, flatten
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.parallel.rules import bytes_on_one_device
from moejax.planning import estimate as estimate_lib
from moejax.planning import topologies
from moejax.planning.estimate import MARGIN, Estimator, Settings
from moejax.planning.memory import Memory
from moejax.planning.topologies import Topology
from moejax.training import spanning_groups
from moejax.training.setup import Setup, prepare
from moejax.training.spanning_groups import sides
from moejax.units import size

_MODEL = (1, 2, 4, 8)  # sizes of the mesh axis `model`: within a host or a corner of a torus


def advise(setup: Setup, memory: Memory, topology: Topology) -> str:
  """Names the largest part of memory and the keys to change, as command line flags that `prepare` accepts.

  Keys are given only if the step is estimated to fit with them; otherwise the smallest topology that it fits.
  """
  estimate = Estimator(setup, memory)
  what, number = _largest(setup, memory)
  most = f'The largest part is {what} ({size(number)}).'
  best = memory.total, estimate.now
  for settings in _ranked(setup, estimate.now, len(topology.devices)):
    total = estimate(settings)
    if total * MARGIN <= memory.available and settings != estimate.now and (
        keys := _accepted_keys(setup, settings, topology)):
      return f'{most} First try {spell(keys)}: {size(total)} per chip by an estimate from this plan.'
    best = min(best, (total, settings), key=lambda one: one[0])
  least = ''
  if best[0] < memory.total and (keys := _accepted_keys(setup, best[1], topology)):
    least = f'; the minimum is {size(best[0])}, with {spell(keys)}'
  return (f'{most} By an estimate from this plan, no setting makes it fit {topology.name} with '
          f'{MARGIN - 1:.0%} to spare{least}. {_larger(setup, estimate, topology)}')


def spell(keys: dict[str, int | str]) -> str:
  """Keys as command line flags."""
  return ' '.join(f'--config.{key}={value}' for key, value in keys.items())


def exchanges(config) -> list[str]:
  """Config keys that choose between a ragged all-to-all and other exchanges for dropless stacks."""
  dispatch = {path: side.moe.dispatch for path, side in sides(config).items() if side.get('moe')}
  return [f'{path}.moe.dispatch.exchange' for path, one in dispatch.items()
          if one.name == 'grouped' and one.get('exchange') != 'all_gather']


def divisors(number: int) -> list[int]:
  """All divisors, smallest first."""
  return [n for n in range(1, number + 1) if number % n == 0]


def _larger(setup: Setup, estimate: Estimator, topology: Topology) -> str:
  for name, chip in topologies.by_size(topology):
    for settings in _ranked(setup, estimate.now, topologies.chips(name)):
      total = estimate(settings)
      if total * MARGIN <= chip.memory:
        keys = spell(_keys(setup, settings, name))
        return (f'By the same estimate the smallest topology that holds it is --topology={name}'
                f'{" " if keys else ""}{keys}: {size(total)} of {size(chip.memory)} per chip.')
  return 'It does not fit any known topology either: make the model, its batch or its examples smaller.'


def _ranked(setup: Setup, now: Settings, chips: int) -> list[Settings]:
  """Settings that divide the model and the batch over `chips`, by increasing cost in time."""
  batch = next(iter(setup.pipeline.batch_spec().values())).shape[0]
  experts, heads = _experts(setup), math.gcd(*(side.get('attention', {}).get('heads', 1)
                                               for side in sides(setup.config).values()))
  full = any(side.get('remat', 'none') != 'full' for side in sides(setup.config).values())
  one_hot = any(map(estimate_lib.one_hot_of_batch, sides(setup.config).values()))
  found: list[Settings] = []
  stages: set[rules.Zero] = {now.zero, 3}
  for model, expert in itertools.product(_MODEL, divisors(experts)):
    if chips % (model * expert) or (model > 1 and heads % model):
      continue
    rest, shards = chips // (model * expert), chips // model
    if batch % shards:
      continue
    for data, accumulate, zero, remat, within in itertools.product(
        {1, math.gcd(rest, now.axes['data'])}, divisors(batch // shards), stages, {False, full},
        {None, 'sequence' if one_hot else None}):
      if accumulate >= now.accumulate:
        found.append(Settings((data, rest // data, expert, model), accumulate, zero, remat, within))
  return sorted(found, key=lambda settings: _cost(now, settings))


def _cost(now: Settings, new: Settings) -> float:
  """Relative cost in time, for ranking: sharding costs least, then smaller microbatches, then recomputation."""
  doublings = {axis: abs(math.log2(new.axes[axis] / now.axes[axis])) for axis in mesh_lib.AXES}
  return (0.1 * doublings['data'] + 0.3 * doublings['expert'] + 3 * doublings['model'] + 0.1 * (new.zero != now.zero) +
          0.5 * (new.groups is not None) + 1.5 * new.full_remat + math.log2(new.accumulate / now.accumulate))


def _keys(setup: Setup, settings: Settings, topology: str) -> dict[str, int | str]:
  """The keys of `settings`, plus the groups and the exchange that the topology requires."""
  keys = estimate_lib.overrides(setup.config, settings)
  if settings.groups is None:
    keys |= {f'{path}.group': group.dividing
             for path, group in spanning_groups.spanning(setup, settings.accumulate, settings.shards).items()
             if isinstance(group.group, int)}
  if settings.axes['expert'] > 1 and not topologies.has_ragged_all_to_all(topology):
    keys |= dict.fromkeys(exchanges(setup.config), 'all_gather')
  return keys


def _accepted_keys(setup: Setup, settings: Settings, topology: Topology) -> dict[str, int | str]:
  """The keys of `settings`, or none if `prepare` rejects them."""
  try:
    keys = _keys(setup, settings, topology.name)
    prepare(override(setup.config, keys), topology.devices)
  except ConfigError:
    return {}
  return keys


def _largest(setup: Setup, memory: Memory) -> tuple[str, int]:
  experts, others = _parameters(setup)
  held = memory.parameters + memory.optimizer + memory.others + memory.gradients
  parts = {
      f'{"experts" if experts > others else "parameters"} with their gradients and optimizer state': held,
      'activations kept for the backward pass': memory.activations,
      'the working set of a block: activations, buffers of experts, gathered weights': memory.working_set}
  return max(parts.items(), key=lambda part: part[1])


def _parameters(setup: Setup) -> tuple[int, int]:
  """Bytes of parameters on one device: (of experts, all others)."""
  params, _ = setup.model.shapes()
  shardings = rules.shardings(setup.mesh, setup.model.axes, params, setup.rules.parameters)
  placed = flatten(jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                                params, shardings))
  experts = bytes_on_one_device([placed[path] for path in expert_paths(setup.model.axes)])
  return experts, bytes_on_one_device(placed) - experts


def _experts(setup: Setup) -> int:
  """The number that the mesh axis `expert` must divide: the gcd of the experts of all layers."""
  axes, shapes = flatten(setup.model.axes), flatten(setup.model.shapes()[0])
  return math.gcd(*(length for path, leaf in shapes.items() for name, length in zip(axes[path], leaf.shape)
                    if name == 'expert')) or 1
