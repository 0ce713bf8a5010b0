"""Choices sorted by expert: what a queue at every expert, and every ragged layout, is made of."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ByExpert(NamedTuple):
  """Choices in the order of their experts.

  Attributes:
    order: <int32>[M] the choice at each place; those of one expert stay in the order they had.
    position: <int32>[M] the place of each choice.
    sizes: <int32>[E] choices of each expert.
  """
  order: jax.Array
  position: jax.Array
  sizes: jax.Array


def by_expert(expert: jax.Array, num_experts: int) -> ByExpert:
  """Sorts the choices `expert` <int32>[M]; those that name `num_experts` are nobody's and come last."""
  order = _stable_order(expert, num_experts)
  position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
  return ByExpert(order, position, jnp.bincount(expert, length=num_experts))


def _stable_order(expert, num_experts):
  # One sort of single numbers is much faster on CPUs than an argsort.
  count = expert.size
  if (num_experts + 1) * count > jnp.iinfo(jnp.int32).max:
    return jnp.argsort(expert, stable=True)
  return jnp.sort(expert * count + jnp.arange(count)) % count
