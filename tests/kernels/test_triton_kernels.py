"""Triton kernels, interpreted on CPU, equal a float64 loop over groups; and they lower for absent GPUs.

The oracle is the loop below, on the padded layout that kernels work on: groups of whole blocks of 128 rows, an empty
group having one block of zero rows, and NaN in the rows of blocks that no group uses.
"""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from implementation_tests import group_products
from moejax.kernels import triton
from moejax.kernels.choice import Shape
from moejax.kernels.target import Target, interpreted

# Three steps of 16 columns in 48, and two in 32: loops and tiles of more than one step both ways.
BLOCKS, D, F, E = 6, 32, 48, 3
M = BLOCKS * triton.ROWS
GPU = Target('gpu', 'NVIDIA A100-SXM4-80GB')
# Columns, step and warps of tiles that ptxas, compiling for A100 (sm_80), found more than 64 bytes of no register for.
SPILL = {('bfloat16', 256, 32, 4), *(('float32', *tiles) for tiles in [(256, 32, 8), (128, 64, 8), (128, 32, 4),
                                                                       (64, 64, 4), (64, 64, 8)])}


def draw(blocks, dtype, empty=()):
  """Inputs in the padded layout: the one block of each `empty` group is zeros, unused blocks are NaN."""
  group_sizes = np.array(blocks) * triton.ROWS
  group = np.repeat(np.arange(len(blocks) + 1), [*group_sizes, M - group_sizes.sum()])[:, None]
  rng = np.random.RandomState(0)
  rows = lambda width: np.select([np.isin(group, empty), group == len(blocks)], [0., np.nan], rng.randn(M, width))
  return (jnp.asarray(rows(D), dtype), jnp.asarray(rng.randn(len(blocks), D, F), dtype),
          jnp.asarray(group_sizes, jnp.int32), jnp.asarray(rows(F), dtype))


@jax.jit
def run(x, w, group_sizes, dy):
  with interpreted('gpu'):
    return (triton.matmul(x, w, group_sizes), triton.matmul(dy, w, group_sizes, transpose=True),
            triton.weight_gradient(x, dy, group_sizes))


def check(x, w, group_sizes, dy, rtol=0.):
  got, used = run(x, w, group_sizes, dy), int(group_sizes.sum())
  for a, b in zip((got[0][:used], got[1][:used], got[2]), group_products(x, w, np.asarray(group_sizes), dy), strict=True):
    # At most M float32 additions of products below 16, and what rounding the result adds.
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=M * 2**-24 * 16)
  return got


@given(blocks=st.lists(st.integers(1, 4), min_size=E, max_size=E).filter(lambda blocks: sum(blocks) <= BLOCKS))
@example(blocks=[1, 1, 1])
@example(blocks=[1, 4, 1])
def test_equals_the_loop_over_groups_for_any_number_of_blocks(blocks):
  check(*draw(blocks, jnp.float32))


def test_the_matrix_of_a_group_of_zero_rows_gets_exact_zeros_and_unused_blocks_of_nan_reach_nothing():
  y, dx, dw = check(*draw([2, 1, 1], jnp.float32, empty=[1]))
  used = 4 * triton.ROWS
  assert not y[256:384].any() and not dx[256:384].any() and not dw[1].any()
  assert not jnp.isnan(y[:used]).any() and not jnp.isnan(dx[:used]).any() and dw[0].any() and dw[2].any()


def test_blocks_that_no_group_uses_are_not_multiplied():
  x, w, group_sizes, dy = draw([2, 1, 1], jnp.float32)
  y, dx, _ = run(jnp.nan_to_num(x, nan=1.), w, group_sizes, jnp.nan_to_num(dy, nan=1.))
  unused = slice(4 * triton.ROWS, None)
  # They would belong to the last expert.
  assert not np.isclose(y[unused], w[-1].sum(0)).any() and not np.isclose(dx[unused], w[-1].sum(1)).any()


def test_one_group_is_a_plain_product():
  x, w, group_sizes, dy = draw([BLOCKS], jnp.float32)
  y, _, dw = check(x, w, group_sizes, dy)
  np.testing.assert_allclose(y, x @ w[0], atol=D * 2**-24 * 16)
  np.testing.assert_allclose(dw[0], x.T @ dy, atol=M * 2**-24 * 16)


def test_bfloat16_is_rounded_once_at_the_end_and_weight_gradients_not_at_all():
  # Rounding to 8 significant bits is off by at most 2^-8 of the value.
  y, dx, dw = check(*draw([3, 1, 1], jnp.bfloat16), rtol=2**-8)
  assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


def test_every_tile_is_visited_once_whatever_the_number_of_blocks():
  for blocks, columns in [(1, 1), (3, 5), (8, 2), (19, 4)]:
    tiles = [tuple(map(int, triton._side_by_side(n, blocks, columns))) for n in range(blocks * columns)]
    assert sorted(tiles) == [(block, column) for block in range(blocks) for column in range(columns)]


def test_eight_blocks_of_rows_share_a_column_before_the_next_one():
  tiles = [tuple(map(int, triton._side_by_side(n, 16, 4))) for n in range(16)]
  assert tiles == [(block, column) for column in range(2) for block in range(8)]


@pytest.mark.parametrize('kind', ['NVIDIA A100-SXM4-80GB', 'NVIDIA H100 80GB HBM3'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('widths', [(2880, 16), (4096, 14336)], ids=str)
def test_all_kernels_lower_for_gpus_at_full_size(kind, dtype, widths):
  rows, groups = 64 * triton.ROWS, 8
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  x, w, dy = spec(rows, widths[0]), spec(groups, *widths), spec(rows, widths[1])
  group_sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=108, platform='gpu')
  kernels = [(triton.matmul, (x, w, group_sizes)), (triton.weight_gradient, (x, dy, group_sizes)),
             (lambda *a: triton.matmul(*a, transpose=True), (dy, w, group_sizes))]
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ('d',), abstract_device=device)):
    for kernel, arguments in kernels:
      text = jax.jit(kernel).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()
      assert 'triton' in text


@pytest.mark.parametrize('kernel, depth, width', [('matmul', 'inner', 'outer'), ('transposed', 'outer', 'inner'),
                                                  ('weight_gradient', None, 'outer')])
@pytest.mark.parametrize('dtype, size', [('float32', 4), ('bfloat16', 2)])
@pytest.mark.parametrize('widths', [(4096, 14336), (2880, 768), (16, 48)], ids=str)
def test_candidates_divide_the_shape_and_fit_shared_memory_and_registers(kernel, depth, width, dtype, size, widths):
  shape = Shape(4096, 8, *widths, dtype)
  options = triton.candidates(kernel, shape)
  assert len(set(options)) == len(options) >= 1
  for tiles in options:
    assert getattr(shape, width) % tiles.block_n == 0 and (getattr(shape, depth) if depth else 128) % tiles.block_k == 0
    # One step holds 128 x block_k and block_k x block_n inputs; an A100 block may have 163 KiB.
    assert tiles.stages * tiles.block_k * (128 + tiles.block_n) * size <= 163 * 1024
    # A warp has 32 threads of 255 registers; at most half of those for float32 sums.
    assert 128 * tiles.block_n / (32 * tiles.warps) <= 128
    # In float32 a thread multiplies by itself; ptxas spills registers of sm_80 from these on.
    assert (dtype, tiles.block_n, tiles.block_k, tiles.warps) not in SPILL
    # Tensor core instructions are at least 16 wide.
    assert tiles.block_n >= 16 and tiles.block_k >= 16


@pytest.mark.parametrize('target, change, message', [
    (Target('cpu', 'cpu'), {}, "NVIDIA GPUs from Ampere on, not for 'cpu': use xla"),
    (Target('tpu', 'TPU v5 lite'), {}, "not for 'TPU v5 lite'.*ragged_dot"),
    (Target('gpu', 'Tesla T4'), {}, "not for 'Tesla T4'"),
    (GPU, dict(inner=24), 'multiples of 16, not 24 and 64'),
    (GPU, dict(outer=100), 'multiples of 16, not 64 and 100'),
    (GPU, dict(dtype='float64'), 'bfloat16, float16, float32, not float64'),
])
def test_its_limits_are_explained_in_a_sentence(target, change, message):
  shape = Shape(1024, 4, 64, 64, 'bfloat16')
  assert triton.limit(GPU, shape) is None
  assert triton.limit(Target('gpu', 'interpreted', interpret=True), shape) is None
  assert re.search(message, triton.limit(target, shape._replace(**change)))
