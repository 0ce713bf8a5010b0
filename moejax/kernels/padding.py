"""Padding of groups to multiples of a block, so that every block of rows uses one matrix.

GPU and TPU kernels then need no masks. Padding rows are zeros, and every group gets at least one block, so that even
the matrix of an empty group gets its (zero) gradient.
"""
import jax.numpy as jnp
from jaxtyping import Array, Int


def padded_rows(num_rows: int, num_groups: int, multiple: int) -> int:
  """Rows that suffice for any group sizes with a sum of at most `num_rows`: one more block per group."""
  return (num_rows // multiple + num_groups) * multiple


def pad_groups(group_sizes: Int[Array, 'E'], num_rows: int,
               multiple: int) -> tuple[Int[Array, 'E'], Int[Array, 'P'], Int[Array, 'M']]:
  """Positions of rows after padding the groups.

  Args:
    group_sizes: <int32>[E], together at most M.
    num_rows: M.
    multiple: rows in a block.

  Returns:
    Padded sizes <int32>[E]; the source row of each padded row, M for padding, <int32>[P]; and its inverse, the position
    of each row, P for rows after the last group, <int32>[M].
  """
  total = padded_rows(num_rows, len(group_sizes), multiple)
  sizes = jnp.maximum(-(-group_sizes // multiple), 1) * multiple
  end, padded_end = jnp.cumsum(group_sizes), jnp.cumsum(sizes)
  shift = (padded_end - sizes) - (end - group_sizes)  # how far each group moves

  row = jnp.arange(num_rows, dtype=jnp.int32)
  group = jnp.searchsorted(end, row, side='right')
  place = jnp.where(row < end[-1], row + shift.at[group].get(mode='clip'), total)

  padded_row = jnp.arange(total, dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(padded_end, padded_row, side='right'), len(group_sizes) - 1)
  source = padded_row - shift[group]
  source = jnp.where((padded_row < padded_end[-1]) & (source < end[group]), source, num_rows)
  return sizes.astype(jnp.int32), source.astype(jnp.int32), place.astype(jnp.int32)


def block_experts(group_sizes: Int[Array, 'E'], multiple: int,
                  num_blocks: int) -> tuple[Int[Array, 'blocks'], Int[Array, '']]:
  """The expert of each block and the number of used blocks; unused blocks repeat the last expert.

  Args:
    group_sizes: <int32>[E], multiples of `multiple`.
    multiple: rows in a block.
    num_blocks: number of blocks of all rows.

  Returns:
    <int32>[num_blocks] and <int32>[].
  """
  end = jnp.cumsum(group_sizes) // multiple
  expert = jnp.searchsorted(end, jnp.arange(num_blocks, dtype=jnp.int32), side='right')
  return jnp.minimum(expert, len(group_sizes) - 1).astype(jnp.int32), end[-1].astype(jnp.int32)
