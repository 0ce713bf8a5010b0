"""The first thing to change when a step does not fit a chip: by what is largest there."""
import jax

from moejax.functional import flatten
from moejax.parallel import rules
from moejax.parallel.memory import Memory, bytes_on_one_device
from moejax.parallel.topologies import Topology
from moejax.parallel.units import size


def advise(setup, memory: Memory, topology: Topology) -> str:
  """Two sentences: what takes most memory, and the key to change, as it is written on a command line."""
  held = memory.parameters + memory.optimizer + memory.others + memory.gradients
  parts = {_less_state: held, _less_kept: memory.activations, _smaller_working_set: memory.working_set}
  largest = max(parts, key=parts.get)
  what, change = largest(setup, topology)
  return f'Most of it is {what} ({size(parts[largest])}). First try {change}.'


def divisors(number: int) -> list[int]:
  """All divisors, smallest first."""
  return [n for n in range(1, number + 1) if number % n == 0]


def _less_state(setup, topology) -> tuple[str, str]:
  mesh, chips = setup.mesh.shape, len(topology.devices)
  experts, others = _parameters(setup)
  what = f'{"experts" if experts > others else "parameters"} with their gradients and optimizer state'
  if setup.config.sharding.zero < 3 and mesh['fsdp'] * mesh['expert'] > 1:
    return what, '--config.sharding.zero=3, which also shares out parameters and gradients over fsdp and expert'
  copies = mesh['data']  # of everything: this axis alone shares out no parameters
  wider = [n for n in divisors(mesh['expert'] * copies) if n > mesh['expert'] and _experts(setup) % n == 0 and
           n % mesh['expert'] == 0]
  if experts > others and wider:
    ways = wider[0] // mesh['expert']
    return what, (f'--config.mesh.expert={wider[0]} --config.mesh.data={copies // ways}, which shares them out over '
                  f'{ways} times as many chips')
  if copies > 1:
    return what, (f'--config.mesh.fsdp={copies * mesh["fsdp"]} --config.mesh.data=1, which shares them out over all '
                  f'{chips} chips')
  larger = f'a larger topology: each of the {chips} chips holds its part and no more'
  if setup.config.optimizer.name != 'adafactor':
    return what, ('--config.optimizer.name=adafactor, without the keys that only '
                  f'{setup.config.optimizer.name} has, or {larger}')
  return what, larger


def _less_kept(setup, topology) -> tuple[str, str]:
  what = 'activations kept for the backward pass'
  for path, side in _sides(setup).items():
    if side.get('remat', 'none') != 'full':
      return what, f'--{path}.remat=full, which keeps only what enters each block'
  return what, _microbatches(setup)


def _smaller_working_set(setup, topology) -> tuple[str, str]:
  what = 'what a block needs while it runs: activations, buffers of experts, gathered weights'
  for path, side in _sides(setup).items():
    moe = side.get('moe')
    if moe and 'dispatch' in moe and moe.dispatch.name == 'einsum' and moe.group == 'batch':
      return what, f'--{path}.moe.group=sequence: one-hot matrices grow with the square of a group'
  return what, _microbatches(setup)


def _microbatches(setup) -> str:
  """More of them, each smaller; where each has one example a device already, tensor parallelism."""
  count, shards = setup.training.accumulate, rules.batch_shards(setup.mesh)
  of_device = next(iter(setup.pipeline.batch_spec().values())).shape[0] // shards
  more = [n for n in divisors(of_device) if n > count]
  if more:
    return (f'--config.training.accumulate={more[0]}, so that a device holds {of_device // more[0]} '
            'examples at a time')
  model = 2 * setup.mesh.shape['model']
  return (f'--config.mesh.model={model}, which splits heads, hidden units and vocabulary (another axis has to give '
          'way), or a smaller --config.data.batch_size')


def _parameters(setup) -> tuple[int, int]:
  """Bytes on one device of parameters (of experts, of all else)."""
  params, _ = setup.model.shapes()
  shardings = rules.shardings(setup.mesh, setup.model.axes, params, setup.rules.parameters)
  placed = flatten(jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                                params, shardings))
  of_experts = [leaf for path, leaf in placed.items() if 'expert' in flatten(setup.model.axes)[path]]
  experts = bytes_on_one_device(of_experts)
  return experts, bytes_on_one_device(placed) - experts


def _experts(setup) -> int:
  axes, shapes = flatten(setup.model.axes), flatten(setup.model.shapes()[0])
  return max((length for path, leaf in shapes.items() for name, length in zip(axes[path], leaf.shape)
              if name == 'expert'), default=0)


def _sides(setup) -> dict[str, dict]:
  """{config path: config} of the stacks of the model."""
  model = setup.config.model
  sides = {f'config.model.{side}': model[side] for side in ('encoder', 'decoder') if side in model}
  return sides or {'config.model': model}
