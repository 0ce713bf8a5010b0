"""FLOPs of matrix products in a traced program, over all devices.

    flops(jax.make_jaxpr(train_step)(state, batch).jaxpr)

Compilers count a loop's body once and cannot see into kernels; here loops count as often as they run, and kernels by
their products. Other operations are not counted: their cost is memory traffic rather than FLOPs.
"""
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp


def flops(jaxpr: Any, of: Callable[[str], bool] = lambda scope: True) -> float:
  """FLOPs of the products of a jaxpr whose name scope (as `jax.named_scope` stacks them, 'a/b') satisfies `of`.

  Products inside `jax.shard_map` count for every device. Of a conditional, the largest branch counts; of a loop of
  unknown length, one iteration.
  """
  return _count(jaxpr, of, '')


def _count(jaxpr, of, around) -> float:
  return sum(_equation(eqn, of, f'{around}/{eqn.source_info.name_stack}') for eqn in jaxpr.eqns)


def _equation(eqn, of, scope) -> float:
  name, params = eqn.primitive.name, eqn.params
  if count := _PRODUCTS.get(name):
    return count(eqn) if of(scope) else 0.
  inside = [_count(inner, of, scope) for inner in _jaxprs(params)]
  if name == 'cond':
    return max(inside)
  if name == 'scan':
    return params['length'] * sum(inside)
  if name == 'shard_map':
    return math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes']) * sum(inside)
  return sum(inside)


def _dot(eqn) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  return 2. * math.prod(eqn.outvars[0].aval.shape) * _sizes(eqn.invars[0].aval.shape, contracted)


def _ragged_dot(eqn) -> float:
  left, right = (v.aval.shape for v in eqn.invars[:2])
  (contracted, other), (batch, _) = eqn.params['ragged_dot_dimension_numbers'].dot_dimension_numbers
  groups = eqn.params['ragged_dot_dimension_numbers'].rhs_group_dimensions
  # Each row is in one group, so the group axis of the right side is neither contracted nor in the output.
  kept = [size for axis, size in enumerate(right) if axis not in (*other, *groups) and axis not in batch]
  return 2. * math.prod(left) * math.prod(kept) if contracted else 0.


def _convolution(eqn) -> float:
  kernel, numbers = eqn.invars[1].aval.shape, eqn.params['dimension_numbers']
  return 2. * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]


def _kernel(eqn) -> float:
  """The cost estimate of a Pallas kernel, or else the grouped product of its matrices [M,K] and [E,K,N]."""
  estimate = eqn.params.get('cost_estimate')
  if estimate is not None:
    return float(estimate.flops)
  arrays = [getattr(v.aval, 'inner_aval', v.aval) for v in (*eqn.invars, *eqn.outvars)]
  shapes = [array.shape for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
  rows = max((shape[0] for shape in shapes if len(shape) == 2), default=0)
  return sum(2. * rows * math.prod(shape[1:]) for shape in shapes if len(shape) == 3)


_PRODUCTS = {'dot_general': _dot, 'ragged_dot_general': _ragged_dot, 'ragged_dot': _ragged_dot,
             'conv_general_dilated': _convolution, 'pallas_call': _kernel, 'mpmd_map': _kernel,
             'core_map': _kernel}


def _jaxprs(params) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, 'jaxpr', item)
      if hasattr(inner, 'eqns'):
        yield inner


def _sizes(shape, axes) -> int:
  return math.prod(shape[axis] for axis in axes)
