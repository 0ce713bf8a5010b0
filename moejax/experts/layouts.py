"""Memory layouts of the rows that experts compute (`Layout`): in buffers, sorted by expert, or all of the same weights.

Dropout masks are drawn per row from its id, which depends only on token and expert, so that all dispatchers draw the
same masks.
"""
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.kernels.grouped_matmul import Name, grouped_matmul


class Layout(Protocol):
  """Layout of routed rows: `[E,N,D]` buffers, or `[M,D]` rows sorted by expert."""

  def matmul(self, rows: Float[Array, '... D'], w: Float[Array, 'E D F']) -> Float[Array, '... F']:
    """rows: <float>[..,D], w: <float>[E,D,F] -> <float>[..,F]: each row times the matrix of its expert."""
    ...

  def per_row(self, b: Float[Array, 'E F']) -> Float[Array, '... F']:
    """b: <float>[E,F] -> an array that broadcasts to <float>[..,F]: the vector of each row's expert."""
    ...

  def once(self, b: Float[Array, 'E D']) -> Float[Array, 'E D']:
    """b: <float>[E,D] -> the bias on one shard only, so that a later psum over hidden-unit shards adds it once."""
    ...

  def whole(self, y: Float[Array, '... D']) -> Float[Array, '... D']:
    """y: <float>[..,D] -> its psum over hidden-unit shards, if there are any."""
    ...

  def bernoulli(self, key: jax.Array, p: float, shape: tuple[int, ...]) -> Bool[Array, '... F']:
    """<bool>[..,F] of `shape`: True with probability `p`; a token and expert get the same draws in any layout."""
    ...


@dataclasses.dataclass(frozen=True)
class HiddenShard:
  """The shard of the hidden units on this device inside a `jax.shard_map`; experts then return partial sums.

  Attributes:
    axes: mesh axes over which hidden units are sharded.
  """
  axes: tuple[str, ...]

  def once(self, b: Float[Array, 'E D']) -> Float[Array, 'E D']:
    """`b` on the first shard, zeros on the others."""
    return jnp.where(jax.lax.axis_index(self.axes) == 0, b, 0)

  def bernoulli(self, key, p, width):
    """<bool>[width]: this shard's part of one draw for all hidden units."""
    drawn = jax.random.bernoulli(key, p, (width * jax.lax.axis_size(self.axes),))
    return jax.lax.dynamic_slice(drawn, (width * jax.lax.axis_index(self.axes),), (width,))


class _Rows(Layout):
  # Base class of layouts of routed rows; `part` is None if all hidden units are on this device.
  row_ids: jax.Array
  part: HiddenShard | None

  def once(self, b):
    """b: <float>[E,D] -> b on one shard, zeros on the others, for use before a sum over shards."""
    return b if self.part is None else self.part.once(b)

  def whole(self, y):
    """y: <float>[..,D] -> the sum over all shards."""
    return y if self.part is None else jax.lax.psum(y, self.part.axes)

  def bernoulli(self, key, p, shape):
    """<bool> of `shape`, by row id."""
    draw = self.part.bernoulli if self.part else lambda key, p, width: jax.random.bernoulli(key, p, (width,))
    rows = jax.vmap(lambda row: draw(jax.random.fold_in(key, row), p, shape[-1]))(self.row_ids.reshape(-1))
    return rows.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Buffers(_Rows):
  """Rows <float>[E,N,D]: the same number for each expert.

  Attributes:
    row_ids: <int32>[E,N].
    part: shard of the hidden units.
  """
  row_ids: Int[Array, 'E N']
  part: HiddenShard | None = None

  def matmul(self, rows, w):
    """rows: <float>[E,N,D], w: <float>[E,D,F] -> <float>[E,N,F]."""
    return jnp.einsum('end,edf->enf', rows, w)

  def per_row(self, b):
    """b: <float>[E,F] -> <float>[E,1,F]."""
    return b[:, None]


@dataclasses.dataclass(frozen=True)
class Ragged(_Rows):
  """Rows <float>[M,D] sorted by expert; rows without an expert come last.

  Attributes:
    expert: <int32>[M] expert of each row; E for none.
    group_sizes: <int32>[E] number of rows of each expert.
    row_ids: <int32>[M].
    implementation: of the grouped matmul.
    part: shard of the hidden units.
  """
  expert: Int[Array, 'M']
  group_sizes: Int[Array, 'E']
  row_ids: Int[Array, 'M']
  implementation: Name | None = None
  part: HiddenShard | None = None

  def matmul(self, rows, w):
    """rows: <float>[M,D], w: <float>[E,D,F] -> <float>[M,F]."""
    return grouped_matmul(rows, w, self.group_sizes, implementation=self.implementation)

  def per_row(self, b):
    """b: <float>[E,F] -> <float>[M,F]."""
    return b.at[self.expert].get(mode='fill', fill_value=0, indices_are_sorted=True)


class Dense(Layout):
  """Rows <float>[..,D] that all use the same weights, without an expert axis."""

  def matmul(self, rows, w):
    """rows: <float>[..,D], w: <float>[D,F] -> <float>[..,F]."""
    return rows @ w

  def per_row(self, b):
    """b: <float>[F] -> the same."""
    return b

  def once(self, b):
    """b: <float>[D] -> the same."""
    return b

  def whole(self, y):
    """y: <float>[..,D] -> the same."""
    return y

  def bernoulli(self, key, p, shape):
    """<bool>[..,F]."""
    return jax.random.bernoulli(key, p, shape)


def row_ids(token: Int[Array, '#*M'], expert: Int[Array, '#*M'], num_experts: int) -> Int[Array, '...']:
  """<int32>: a unique id per token (numbered over all groups) and expert."""
  return token * num_experts + jnp.minimum(expert, num_experts - 1)
