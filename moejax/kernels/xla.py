"""Grouped matmul in plain JAX: for each matrix, a loop over blocks of its own rows.

No row meets a matrix that is not its own, and nothing of size M is copied or padded: a block is a slice of `x` that
starts where the group's rows do, and the number of blocks is known only when the program runs. Made for CPUs.
"""
import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose: bool = False) -> jax.Array:
  """x: <float>[M,D], w: <float>[E,D,F] -> <float>[M,F]; transposed, x: <float>[M,F] -> <float>[M,D]."""
  def group(y, group):
    matrix, start, size = group

    def block(y, at, mine):
      product = _dot(_read(x, at, mine), matrix, (1, 1 if transpose else 0)).astype(x.dtype)
      return lax.dynamic_update_slice_in_dim(y, jnp.where(mine, product, _read(y, at, mine)), at, axis=0)

    return _over_blocks(block, y, start, size, x.shape[0], w.shape[0]), None

  y = jnp.zeros((x.shape[0], w.shape[1 if transpose else 2]), x.dtype)
  return lax.scan(group, y, (w, _starts(group_sizes), group_sizes))[0]


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """x: <float>[M,D], dy: <float>[M,F] -> <float32>[E,D,F]."""
  def group(_, group):
    start, size = group

    def block(dw, at, mine):
      # Both sides are selected: a foreign row's 0 * NaN would be NaN.
      return dw + _dot(jnp.where(mine, _read(x, at, mine), 0), jnp.where(mine, _read(dy, at, mine), 0), (0, 0))

    dw = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
    return None, _over_blocks(block, dw, start, size, x.shape[0], group_sizes.shape[0])

  return lax.scan(group, None, (_starts(group_sizes), group_sizes))[1]


def block_sizes(num_rows: int, num_groups: int) -> tuple[int, int]:
  """Rows in a block, and in the blocks that cover the rest of a group.

  A large block reads its matrix seldom for the work done with it; a large last block works on rows of other groups.
  """
  per_group = max(num_rows // num_groups, 1)
  block = max(64, min(256, 1 << (per_group.bit_length() - 1)))
  return min(block, num_rows), min(block // 4, num_rows)


def _over_blocks(body, carry, start, size, num_rows, num_groups):
  # `body(carry, at, mine)` for blocks that cover the rows start .. start+size: `at` is the first row of the block, and
  # `mine` <bool>[rows,1] says which of its rows belong to the group and were in no block before.
  end = start + size

  def run(carry, rows, start, count):
    def step(n, carry):
      first = start + n * rows
      at = jnp.minimum(first, num_rows - rows)
      row = at + jnp.arange(rows)
      return body(carry, at, ((row >= first) & (row < end))[:, None])
    return lax.fori_loop(0, count, step, carry)

  block, rest = block_sizes(num_rows, num_groups)
  full = size // block
  carry = run(carry, block, start, full)
  return run(carry, rest, start + full * block, (size - full * block + rest - 1) // rest)


def _read(x, at, mine):
  return lax.dynamic_slice_in_dim(x, at, mine.shape[0], axis=0)


def _starts(group_sizes):
  return jnp.cumsum(group_sizes) - group_sizes


def _dot(a, b, contract):
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)
