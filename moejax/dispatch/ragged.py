"""The experts of all devices for a dispatcher with sorted rows, which are sent by `jax.lax.ragged_all_to_all`."""
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moejax import experts as experts_lib
from moejax.dispatch.rows import take_rows
from moejax.experts.layouts import Ragged
from moejax.kernels import Routes, expert_block
from moejax.kernels.target import target


@dataclasses.dataclass(frozen=True)
class RaggedExperts(experts_lib.BoundExperts):
  """Sends rows sorted by expert to the devices of the mesh axis `expert`, and returns the experts' outputs.

  There is no fused block: rows are gathered before they are sent, and summed after they return.

  Attributes:
    local: this device's experts.
    number: maps a local row id to its global id.
  """
  local: experts_lib.BoundExperts
  number: Callable[[jax.Array], jax.Array]

  def __call__(self, rows: Float[Array, 'M D'], layout: Ragged) -> Float[Array, 'M D']:
    """rows: <float>[M,D] sorted by expert -> <float>[M,D]."""
    exchange = RaggedExchange.of(layout.group_sizes)
    there = lambda a: exchange.there(a, capacity=rows.shape[0] * exchange.devices)
    arrived = there(rows)
    sizes, source, place = exchange.sorted_by_expert(arrived.shape[0])
    if block := self.local.block():
      routes = Routes(source, jnp.ones(source.shape, jnp.float32), sizes, place[:, None])
      y = expert_block(arrived.astype(block.weights.wi.dtype), block.weights, routes, activation=block.activation,
                       implementation=layout.implementation)
    else:
      expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(source.size), side='right')
      ids = there(self.number(layout.row_ids)[:, None])[:, 0][source]
      y = self.local(take_rows(arrived[None], source[None], place[None, :, None])[0],
                     Ragged(expert, sizes, ids, layout.implementation))
      y = take_rows(y[None], place[None], source[None, :, None])[0]
    return exchange.back(y, rows.shape[0])


@dataclasses.dataclass(frozen=True)
class RaggedExchange:
  """The number of rows sent between each pair of devices.

  Attributes:
    sizes: <int32>[source, destination, expert of the destination].
    me: this device.
  """
  sizes: Int[Array, 'source destination expert']
  me: Int[Array, '']

  @classmethod
  def of(cls, group_sizes: Int[Array, 'E']) -> 'RaggedExchange':
    """group_sizes: <int32>[E] this device's rows for each expert; costs one small all-gather."""
    devices = jax.lax.axis_size('expert')
    return cls(jax.lax.all_gather(group_sizes.reshape(devices, -1), 'expert'), jax.lax.axis_index('expert'))

  @property
  def devices(self) -> int:
    """Number of devices on the axis."""
    return self.sizes.shape[0]

  def there(self, rows: Shaped[Array, 'M D'], capacity: int) -> Shaped[Array, 'capacity D']:
    """rows: <..>[M,D] sorted by expert -> <..>[capacity,D] rows for this device, by source device; then zeros."""
    return _travel(capacity, rows, self._transfer_there, self._transfer_back)

  def back(self, rows: Shaped[Array, 'capacity D'], count: int) -> Shaped[Array, 'count D']:
    """rows: <..>[capacity,D] in order of arrival -> <..>[count,D] in their original order; then zeros."""
    return _travel(count, rows, self._transfer_back, self._transfer_there)

  @property
  def _transfer_there(self) -> 'RaggedTransfer':
    sent = self.sizes.sum(-1)
    arrive = _exclusive(sent, axis=0)  # offset of each source's rows at each destination
    return RaggedTransfer(_exclusive(sent[self.me]), sent[self.me], arrive[self.me], sent[:, self.me])

  @property
  def _transfer_back(self) -> 'RaggedTransfer':
    sent = self.sizes.sum(-1)
    start = _exclusive(sent, axis=1)  # offset of each destination's rows at each source
    return RaggedTransfer(_exclusive(sent[:, self.me]), sent[:, self.me], start[:, self.me], sent[self.me])

  def sorted_by_expert(self, count: int) -> tuple[Int[Array, 'E'], Int[Array, 'count'], Int[Array, 'count']]:
    """Sorts `count` received rows (ordered by source, expert) by expert: group sizes, permutation and its inverse."""
    mine = self.sizes[:, self.me]
    by_source, by_expert = _exclusive(mine.ravel()).reshape(mine.shape), _exclusive(mine.T.ravel()).reshape(mine.T.shape)
    row = jnp.arange(count)

    def moved(sizes, starts, targets):
      # Moves runs of `sizes` rows from `starts` to `targets`. Rows after all runs stay.
      ends = jnp.cumsum(sizes.ravel())
      run = jnp.searchsorted(ends, row, side='right')
      shift = (targets - starts).ravel()
      return row + shift.at[run].get(mode='fill', fill_value=0)
    return (mine.sum(0), moved(mine.T, by_expert, by_source.T), moved(mine, by_source, by_expert.T))


def _exclusive(sizes, axis=0):
  return jnp.cumsum(sizes, axis) - sizes


class RaggedTransfer(NamedTuple):
  """Arguments of a ragged all-to-all over the mesh axis `expert`; each <int32>[devices].

  Attributes:
    starts: offset of the rows sent to each device.
    sizes: number of rows sent to each device.
    targets: their offset in that device's output.
    received: number of rows received from each device.
  """
  starts: Int[Array, 'devices']
  sizes: Int[Array, 'devices']
  targets: Int[Array, 'devices']
  received: Int[Array, 'devices']


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _travel(count, rows, transfer, back):
  # The reverse route is known, while the gradient of jax.lax.ragged_all_to_all would communicate to find it.
  return _ragged_all_to_all(rows, jnp.zeros((count, rows.shape[1]), rows.dtype), transfer)


def _travel_forward(count, rows, transfer, back):
  return _travel(count, rows, transfer, back), (jnp.zeros((rows.shape[0], 0)), transfer, back)


def _travel_backward(count, residuals, d):
  rows, transfer, back = residuals
  return _travel(len(rows), d, back, transfer), None, None


_travel.defvjp(_travel_forward, _travel_backward)


def _ragged_all_to_all(rows, output, transfer):
  """`jax.lax.ragged_all_to_all`, emulated on CPUs by an all-gather. rows: <..>[M,D], output: <..>[N,D]."""
  transfer = RaggedTransfer(*(a.astype(jnp.int32) for a in transfer))
  if target().platform != 'cpu':
    return jax.lax.ragged_all_to_all(rows, output, *transfer, axis_name='expert')
  me = jax.lax.axis_index('expert')
  everywhere = jax.lax.all_gather(rows, 'expert')
  starts, sizes, targets = jax.lax.all_gather(jnp.stack(transfer[:3]), 'expert')[:, :, me].T
  offset = jnp.arange(rows.shape[0]) - starts[:, None]
  place = jnp.where((offset >= 0) & (offset < sizes[:, None]), targets[:, None] + offset, len(output))
  return output.at[place.ravel()].set(everywhere.reshape(-1, rows.shape[1]), mode='drop')
