"""Choices sorted by expert: the basis of expert queues and of ragged layouts."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ByExpert(NamedTuple):
  """Choices sorted by expert.

  Attributes:
    order: <int32>[M] the choice at each position; the sort is stable.
    position: <int32>[M] the position of each choice.
    sizes: <int32>[E] number of choices of each expert.
  """
  order: jax.Array
  position: jax.Array
  sizes: jax.Array


def by_expert(expert: jax.Array, num_experts: int) -> ByExpert:
  """Sorts the choices `expert` <int32>[M]; masked choices name `num_experts` and come last."""
  order = _stable_order(expert, num_experts)
  position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
  return ByExpert(order, position, jnp.bincount(expert, length=num_experts))


def _stable_order(expert, num_experts):
  # On CPUs, sorting plain ints is much faster than an argsort.
  count = expert.size
  if (num_experts + 1) * count > jnp.iinfo(jnp.int32).max:
    return jnp.argsort(expert, stable=True)
  return jnp.sort(expert * count + jnp.arange(count)) % count
