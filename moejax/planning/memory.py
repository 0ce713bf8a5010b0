"""The memory of one chip during a training step, part by part."""
import dataclasses
import functools
import math
import re
from typing import Any

import jax

from moejax.functional import Tree
from moejax.parallel import rules
from moejax.parallel.rules import bytes_on_one_device
from moejax.training import step as step_lib
from moejax.training.setup import Setup

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip.

  Attributes:
    parameters: float32, by their shardings.
    optimizer: state of the optimizer, by its shardings.
    others: router state, moving average and step, by their shardings.
    batch: a chip's share of the batch.
    gradients: float32, by their shardings; part of the temporaries.
    activations: residuals saved for the backward pass of a microbatch, if sharded evenly like the batch; part of the
      temporaries.
    temporaries: all that the program allocates while it runs, as reported by its compiler.
    unaliased: results that do not reuse an argument's memory, padding of arguments and results, and code.
    total: total memory of the step.
    available: memory of the chip available to a program.
    refused: whether the compiler refused the program; total is then a lower bound.
  """
  parameters: int
  optimizer: int
  others: int
  batch: int
  gradients: int
  activations: int
  temporaries: int
  unaliased: int
  total: int
  available: int
  refused: bool = False

  @property
  def fits(self) -> bool:
    """Whether the step fits the chip."""
    return not self.refused and self.total <= self.available

  @property
  def working_set(self) -> int:
    """Temporaries other than gradients and saved activations."""
    return max(0, self.temporaries - self.gradients - self.activations)


def of_program(setup: Setup, state: Any, batch: Tree, available: int, stats: Any) -> Memory:
  """Memory of a compiled step; `stats` is its `memory_analysis()`."""
  parts: dict[str, Any] = held(setup, state, batch) | dict(activations=kept(setup, batch))
  total = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes +
           stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)
  arguments = parts['parameters'] + parts['optimizer'] + parts['others'] + parts['batch']
  return Memory(**parts, temporaries=stats.temp_size_in_bytes, total=total, available=available,
                unaliased=max(0, total - arguments - stats.temp_size_in_bytes))


def of_refused(setup: Setup, state: Any, batch: Tree, available: int, message: str) -> Memory:
  """Memory of a step that the compiler refused for lack of memory, from its message."""
  parts: dict[str, Any] = held(setup, state, batch) | dict(activations=kept(setup, batch))
  arguments = parts['parameters'] + parts['optimizer'] + parts['others'] + parts['batch']
  asked, only_temporaries = refusal(message)
  total = max(asked + arguments if only_temporaries else asked, arguments + parts['gradients'])
  return Memory(**parts, temporaries=max(0, total - arguments), unaliased=0, total=total, available=available,
                refused=True)


def refusal(message: str) -> tuple[int, bool]:
  """(bytes that the TPU compiler says a program needs, or 0, whether they exclude its arguments)."""
  number = r'([\d.]+)([KMGT]?)'
  for pattern, only_temporaries in ((rf'HLO temporaries \({number}\)', True), (rf'Used {number} of', False),
                                    (rf'memory required[^(]*\({number}\)', False)):
    if found := re.search(pattern, message):
      return int(float(found[1]) * _UNITS[found[2]]), only_temporaries
  return 0, True


def held(setup: Setup, state: Any, batch: Tree) -> dict[str, int]:
  """Bytes on one chip of the arrays with shardings: parameters, optimizer, others, batch and gradients."""
  placed = rules.shardings(setup.mesh, setup.model.axes, state.params, setup.rules.gradients)
  gradients = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                           state.params, placed)
  return dict(
      parameters=bytes_on_one_device(state.params), optimizer=bytes_on_one_device(state.opt_state),
      others=bytes_on_one_device((state.router_state, state.average, state.step)), batch=bytes_on_one_device(batch),
      gradients=bytes_on_one_device(gradients))


def kept(setup: Setup, batch: Tree) -> int:
  """Bytes per shard of the batch of the residuals of a microbatch's loss, excluding parameters."""
  count = setup.training.accumulate
  micro = {name: jax.ShapeDtypeStruct((leaf.shape[0] // count, *leaf.shape[1:]), leaf.dtype)
           for name, leaf in batch.items()}
  params, router_state = setup.model.shapes()
  key = jax.eval_shape(lambda: jax.random.key(0))

  def residuals(params, router_state, micro, key):
    loss = functools.partial(step_lib.loss_function, setup)
    of_params = lambda params: loss(params, router_state, micro, key, jax.numpy.float32(1))
    return jax.tree.leaves(jax.vjp(of_params, params, has_aux=True)[1])

  with rules.use(setup.mesh, setup.rules):
    leaves = jax.eval_shape(residuals, params, router_state, micro, key)
  own = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
  total = 0
  for leaf in leaves:
    if (leaf.shape, leaf.dtype) in own:
      own.remove((leaf.shape, leaf.dtype))
    elif not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
      total += math.prod(leaf.shape) * leaf.dtype.itemsize
  return total // rules.batch_shards(setup.mesh)
