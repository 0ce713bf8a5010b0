"""The inputs of an expert block: its weights, and the routes between tokens and rows sorted by expert."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from moejax.kernels import padding


class Weights(NamedTuple):
  """The weights of E feed-forward experts, all of the same dtype.

  Attributes:
    wi: <float>[E,D,F].
    wo: <float>[E,F,D].
    wg: <float>[E,D,F] of the gate if the activation is gated, else None.
    bi: <float>[E,F] or None; likewise `bg`.
    bo: <float>[E,D] or None.
  """
  wi: Float[Array, 'E D F']
  wo: Float[Array, 'E F D']
  wg: Float[Array, 'E D F'] | None = None
  bi: Float[Array, 'E F'] | None = None
  bg: Float[Array, 'E F'] | None = None
  bo: Float[Array, 'E D'] | None = None


class Routes(NamedTuple):
  """M rows, sorted by expert, gathered from N tokens and summed back into them.

  Attributes:
    token: <int32>[M] token of each row.
    weight: <float32>[M] weight of each row in the sum.
    group_sizes: <int32>[E] number of rows of each expert; rows after the last group are ignored.
    position: <int32>[N,K] the rows of each token; if fewer than K, the others are rows after the last group, or M.
      None: a token may have any number of rows, which are then summed by a scatter.
  """
  token: Int[Array, 'M']
  weight: Float32[Array, 'M']
  group_sizes: Int[Array, 'E']
  position: Int[Array, 'N K'] | None = None


class ByExpert(NamedTuple):
  """Choices sorted by expert.

  Attributes:
    order: <int32>[M] the choice at each position; the sort is stable.
    position: <int32>[M] the position of each choice.
    sizes: <int32>[E] number of choices of each expert.
  """
  order: Int[Array, 'M']
  position: Int[Array, 'M']
  sizes: Int[Array, 'E']


def by_expert(expert: Int[Array, 'M'], num_experts: int) -> ByExpert:
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


NOWHERE = jnp.iinfo(jnp.int32).max  # always out of range: reads give zeros, writes are dropped


def ungrouped_nowhere(routes: Routes) -> Routes:
  """The same routes with rows after the last group masked: out-of-range token, zero weight, out-of-range position.

  Arrays are cast to the dtypes of `Routes`, because with jax_enable_x64 they may have 64 bits.
  """
  routes = Routes(routes.token.astype(jnp.int32), routes.weight.astype(jnp.float32), routes.group_sizes.astype(jnp.int32),
                  None if routes.position is None else routes.position.astype(jnp.int32))
  total = routes.group_sizes.sum(dtype=jnp.int32)
  grouped = jnp.arange(routes.token.shape[0]) < total
  position = None if routes.position is None else jnp.where(routes.position < total, routes.position, jnp.int32(NOWHERE))
  return Routes(jnp.where(grouped, routes.token, jnp.int32(NOWHERE)), jnp.where(grouped, routes.weight, 0.),
                routes.group_sizes, position)


def pad(routes: Routes, multiple: int) -> tuple[Routes, Int[Array, 'M']]:
  """The same routes with groups padded to a multiple (see `padding`), and the new position of each row <int32>[M]."""
  num_rows = routes.token.shape[0]
  group_sizes, source, place = padding.pad_groups(routes.group_sizes, num_rows, multiple)
  token = routes.token.at[source].get(mode='fill', fill_value=NOWHERE)
  weight = routes.weight.at[source].get(mode='fill', fill_value=0)
  position = routes.position
  if position is not None:
    position = place.at[position].get(mode='fill', fill_value=NOWHERE)
  return Routes(token, weight, group_sizes, position), place


def take(x: Float[Array, 'N *D'], row: Int[Array, 'M']) -> Float[Array, 'M *D']:
  """x: <float>[N,D], row: <int32>[M] -> <float>[M,D]; zeros where `row` is N or more."""
  return x.at[row].get(mode='fill', fill_value=0)


def combine(y: Float[Array, 'M D'], routes: Routes, weight: Float32[Array, 'M'] | None,
            num_tokens: int) -> Float32[Array, 'N D']:
  """y: <float>[M,D] -> <float32>[N,D]: the (weighted) sum of each token's rows.

  `weight`: <float32>[M] or None.
  """
  position = routes.position
  if position is None:
    y = y.astype(jnp.float32)
    return jnp.zeros((num_tokens, y.shape[1]), jnp.float32).at[routes.token].add(
        y if weight is None else y * weight[:, None], mode='drop')

  def choice(row):
    rows = take(y, row).astype(jnp.float32)
    return rows if weight is None else rows * take(weight, row)[:, None]

  # K gathers of [N,D]: a single gather of [N,K,D] summed over K is several times slower on CPUs.
  return sum_over_choices(lambda k: choice(position[:, k]), position.shape[1])


# Beyond this, choices are a loop: if tokens may choose all experts, an unrolled program would grow with their number.
_UNROLLED = 16


def sum_over_choices(of_choice: Callable[[int | jax.Array], jax.Array], choices: int) -> Shaped[Array, '...']:
  """of_choice(0) + ... + of_choice(choices - 1)."""
  if choices <= _UNROLLED:
    return sum((of_choice(k) for k in range(1, choices)), of_choice(0))
  return jax.lax.fori_loop(1, choices, lambda k, total: total + of_choice(k), of_choice(0))


def stack_over_choices(of_choice: Callable[[int | jax.Array], jax.Array], choices: int) -> Shaped[Array, '... K']:
  """Stacks of_choice(k) <..>[..] for all k -> <..>[..,K]."""
  if choices <= _UNROLLED:
    return jnp.stack([of_choice(k) for k in range(choices)], axis=-1)
  return jnp.moveaxis(jax.lax.map(of_choice, jnp.arange(choices)), 0, -1)
