"""Padding of groups: the guarantees for GPU and TPU kernels."""
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, strategies as st

from implementation_tests import group_sizes
from moejax.kernels import padding

M, E, BLOCK = 100, 6, 16


@jax.jit
def padded(sizes):
  return padding.pad_groups(sizes, M, BLOCK)


@jax.jit
def experts(sizes):
  return padding.block_experts(sizes, BLOCK, padding.padded_rows(M, E, BLOCK) // BLOCK)


@given(sizes=group_sizes(M, E))
def test_every_group_gets_whole_blocks_and_at_least_one(sizes):
  got, source, _ = padded(jnp.array(sizes, jnp.int32))
  assert got.tolist() == [max(1, -(-size // BLOCK)) * BLOCK for size in sizes]
  assert sum(got.tolist()) <= len(source)


@given(sizes=group_sizes(M, E))
def test_each_row_is_in_its_group_once_and_in_order(sizes):
  got, source, place = (np.asarray(a) for a in padded(jnp.array(sizes, jnp.int32)))
  expected, row = [], 0
  for size, room in zip(sizes, got):
    expected += [*range(row, row + size), *[M] * (room - size)]
    row += size
  assert source.tolist() == expected + [M] * (len(source) - len(expected))
  assert [source[p] if p < len(source) else None for p in place] == [*range(row), *[None] * (M - row)]


@given(sizes=group_sizes(M, E))
def test_every_block_belongs_to_one_expert(sizes):
  got, _, _ = padded(jnp.array(sizes, jnp.int32))
  expert, used = experts(got)
  assert expert[:used].tolist() == np.repeat(np.arange(E), np.asarray(got) // BLOCK).tolist()
  assert (np.asarray(expert[used:]) == E - 1).all()


@given(rows=st.integers(0, 500), groups=st.integers(1, 40), block=st.sampled_from([1, 8, 128]))
def test_there_is_room_for_the_worst_load(rows, groups, block):
  # All groups but one hold one row, the worst: each needs a block of its own.
  sizes = [min(1, rows)] * min(groups - 1, rows)
  sizes += [0] * (groups - 1 - len(sizes)) + [rows - sum(sizes)]
  needed = sum(max(1, -(-size // block)) for size in sizes) * block
  assert needed <= padding.padded_rows(rows, groups, block)
