"""Whether a run fits into the memory of its devices; checked before anything is allocated."""
import math
import os

import jax

from moejax import units
from moejax.config import ConfigError
from moejax.parallel.rules import bytes_on_one_device
from moejax.training import step
from moejax.training.setup import Setup


def check(setup: Setup) -> None:
  """Counts the memory that is needed at once: the train state, a gradient of each parameter, and the largest batch of
  training and evaluation.

  Activations are not counted, so a run that passes may still be too large; one that fails cannot run.

  Raises:
    ConfigError: a device has less memory.
  """
  state = step.abstract_state(setup)
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
  of_state = bytes_on_one_device(state) + bytes_on_one_device(state.params)
  batches = {'data.batch_size': setup.pipeline.batch_spec()}
  for name, evaluator in setup.evaluators.items():
    batches |= {f'evaluation.evaluators.{name}.batch_size': spec for _, spec in evaluator.passes}
  sizes = {key: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in spec.values()) // setup.mesh.size
           for key, spec in batches.items()}
  largest = max(sizes, key=lambda key: sizes[key])
  of_batch = sizes[largest]
  if of_state + of_batch > (available := bytes_of_a_device(setup.mesh)):
    key, remedy = (('model', 'make the model smaller, or shard it over more devices (config.mesh)')
                   if of_state > of_batch else (largest, 'lower it, or use more devices'))
    raise ConfigError(f'config.{key}: {units.short(parameters)} parameters with gradients and optimizer take '
                      f'{units.size(of_state)} of each device, the batch {units.size(of_batch)}, and a device has '
                      f'{units.size(available)}: {remedy}. `python -m moejax.plan` plans runs on other machines.')


def bytes_of_a_device(mesh: jax.sharding.Mesh) -> int:
  """Memory of the smallest local device; CPU devices share the memory of their host."""
  local = mesh.local_devices
  if local[0].platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // len(local)
  return min((device.memory_stats() or {}).get('bytes_limit', 2**63) for device in local)
