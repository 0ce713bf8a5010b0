"""Memory layouts of the rows that experts compute (`Layout` in `moejax.experts`), and moving rows into them.

Dropout masks are drawn per row from its id, which depends only on token and expert, so that all dispatchers draw the
same masks.
"""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.kernels import routes
from moejax.kernels.grouped_matmul import Name, grouped_matmul
from moejax.parallel import rules


@dataclasses.dataclass(frozen=True)
class Part:
  """The shard of the hidden units on this device inside a `jax.shard_map`; experts then return partial sums.

  Attributes:
    axes: mesh axes over which hidden units are sharded.
  """
  axes: tuple[str, ...]

  def once(self, b: jax.Array) -> jax.Array:
    """`b` on the first shard, zeros on the others."""
    return jnp.where(jax.lax.axis_index(self.axes) == 0, b, 0)

  def bernoulli(self, key, p, width):
    """<bool>[width]: this shard's part of one draw for all hidden units."""
    drawn = jax.random.bernoulli(key, p, (width * jax.lax.axis_size(self.axes),))
    return jax.lax.dynamic_slice(drawn, (width * jax.lax.axis_index(self.axes),), (width,))


class _Rows:
  # Base class of layouts of routed rows; `part` is None if all hidden units are on this device.
  row_ids: jax.Array
  part: Part | None

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
  row_ids: jax.Array
  part: Part | None = None

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
  expert: jax.Array
  group_sizes: jax.Array
  row_ids: jax.Array
  implementation: Name | None = None
  part: Part | None = None

  def matmul(self, rows, w):
    """rows: <float>[M,D], w: <float>[E,D,F] -> <float>[M,F]."""
    return grouped_matmul(rows, w, self.group_sizes, implementation=self.implementation)

  def per_row(self, b):
    """b: <float>[E,F] -> <float>[M,F]."""
    return b.at[self.expert].get(mode='fill', fill_value=0, indices_are_sorted=True)


class Dense:
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


def row_ids(token: jax.Array, expert: jax.Array, num_experts: int) -> jax.Array:
  """<int32>: a unique id per token (numbered over all groups) and expert."""
  return token * num_experts + jnp.minimum(expert, num_experts - 1)


def to_buffers(rows: jax.Array) -> jax.Array:
  """rows: <float>[G,E,C,D] -> <float>[E,G*C,D]. On a mesh this sends tokens to their experts: one all-to-all."""
  groups, experts, capacity, dim = rows.shape
  rows = rules.constrain(rows, ('group', None, None, None))
  rows = rows.swapaxes(0, 1).reshape(experts, groups * capacity, dim)
  return rules.constrain(rows, ('expert', 'slot', None))


def from_buffers(rows: jax.Array, groups: int) -> jax.Array:
  """rows: <float>[E,G*C,D] -> <float>[G,E,C,D]. On a mesh this sends them back."""
  rows = rules.constrain(rows, ('expert', 'slot', None))
  rows = rows.reshape(rows.shape[0], groups, -1, rows.shape[-1]).swapaxes(0, 1)
  return rules.constrain(rows, ('group', None, None, None))


@jax.custom_vjp
def take_rows(x: jax.Array, source: jax.Array, users: jax.Array) -> jax.Array:
  """Row m of the result is `x[source[m]]`, or zeros where `source[m]` is N. The gradient is a gather, not a scatter.

  Args:
    x: <float>[G,N,D].
    source: <int32>[G,M].
    users: <int32>[G,N,K] the inverse: the rows m whose source is n, filled up with M to K.

  Returns:
    <float>[G,M,D].
  """
  del users
  return take_or_zeros(x, source)


def _take_rows_forward(x, source, users):
  return take_or_zeros(x, source), users


def _take_rows_backward(users, dy):
  # K gathers of [G,N,D]: one of [G,N,K,D] summed over K is several times slower on CPUs.
  return routes.sum_over_choices(lambda k: take_or_zeros(dy, users[..., k]), users.shape[2]), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def sum_choices(y: jax.Array, row: jax.Array, choice: jax.Array, weight: jax.Array) -> jax.Array:
  """The weighted sum of each token's K rows; as in `take_rows`, gradients are gathers.

  Args:
    y: <float>[G,M,D].
    row: <int32>[G,S,K] row of each choice; M for none.
    choice: <int32>[G,M] the inverse: the choice s*K+k of each row; S*K for none.
    weight: <float>[G,S,K].

  Returns:
    <float>[G,S,D].
  """
  del choice
  return routes.sum_over_choices(lambda k: weight[..., k, None] * take_or_zeros(y, row[..., k]), row.shape[2])


def _sum_choices_forward(y, row, choice, weight):
  return sum_choices(y, row, choice, weight), (y, row, choice, weight)


def _sum_choices_backward(residuals, dout):
  y, row, choice, weight = residuals
  groups, _, choices = row.shape
  of_row = take_or_zeros(weight.reshape(groups, -1, 1), choice)
  dy = of_row * take_or_zeros(dout, choice // choices)
  # As an einsum: XLA's CPU backend vectorises it, but not a sum over the last axis fused with a gather.
  of_choice = lambda k: jnp.einsum('gsd,gsd->gs', take_or_zeros(y, row[..., k]), dout)
  dweight = routes.stack_over_choices(of_choice, choices)
  return dy.astype(y.dtype), None, None, dweight.astype(weight.dtype)


sum_choices.defvjp(_sum_choices_forward, _sum_choices_backward)


def take_or_zeros(x: jax.Array, source: jax.Array) -> jax.Array:
  """x: <float>[G,N,D], source: <int32>[G,M] -> <float>[G,M,D]; zeros where `source` is N."""
  return jax.vmap(lambda x, source: x.at[source].get(mode='fill', fill_value=0))(x, source)


def add_rows(y: jax.Array, target: jax.Array, num_rows: int) -> jax.Array:
  """y: <float>[G,M,D], target: <int32>[G,M] -> <float>[G,N,D] sums of the rows by target; target N is dropped."""
  zeros = jnp.zeros((num_rows, y.shape[-1]), y.dtype)
  return jax.vmap(lambda y, target: zeros.at[target].add(y, mode='drop'))(y, target)
