"""Hopper kernels, interpreted on CPU with a detector of races, equal float64 products of groups.

The oracle is numpy, on the layout that kernels work on: groups of whole blocks of 128 rows, an empty group having one
block of zero rows, and NaN in the blocks of rows that no group uses. Interpreted results start out as NaN, so that what
no kernel writes shows. `test_hopper_compile.py` has what ptxas says of the same kernels.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from implementation_tests import group_products, scalar_activation
from moejax.kernels import fp8, hopper, hopper_fp8, tuning
from moejax.kernels.choice import Shape
from moejax.kernels.expert_block import ACTIVATIONS, GATES
from moejax.kernels.hopper import HopperTiles
from moejax.kernels.target import Target, interpreted

interprets = pytest.mark.skipif(not hasattr(plgpu, 'force_gpu_interpret_mode'),
                                reason='Mosaic GPU has a public interpreter from jax 0.11.2 on')
ROWS = hopper.ROW_MULTIPLE
BLOCKS = 6  # with 2 columns of tiles, or two rows and columns: more tiles than the 4 blocks of an interpreted grid
D = F = 192  # three steps of 64, and a tile and a half of 128
H100 = Target('gpu', 'NVIDIA H100 80GB HBM3')
SHAPES = [Shape(16384, 8, 4096, 14336, 'bfloat16'), Shape(262144, 64, 2048, 1024, 'bfloat16'),
          Shape(262144, 128, 2048, 768, 'bfloat16'), Shape(327680, 128, 768, 256, 'bfloat16'),
          Shape(4096, 4, 2880, 64, 'bfloat16')]


def draw(blocks, empty=(), dtype='bfloat16', width=(D, F), unused=np.nan):
  """x, w, group sizes and dy; the one block of each `empty` group is zeros, rows in no group are `unused`."""
  sizes = np.array(blocks) * ROWS
  group = np.repeat(np.arange(len(blocks) + 1), [*sizes, (BLOCKS - sum(blocks)) * ROWS])[:, None]
  rng = np.random.RandomState(0)
  rows = lambda n: np.select([np.isin(group, empty), group == len(blocks)], [0., unused], rng.randn(BLOCKS * ROWS, n))
  return (jnp.asarray(rows(width[0]), dtype), jnp.asarray(rng.randn(len(blocks), *width) / width[0]**.5, dtype),
          jnp.asarray(sizes, jnp.int32), jnp.asarray(rows(width[1]), dtype))


@functools.partial(jax.jit, static_argnames='tiles')
def run(x, w, sizes, dy, tiles):
  with interpreted('gpu'):
    return (hopper.matmul(x, w, sizes, tiles=tiles), hopper.matmul(dy, w, sizes, transpose=True, tiles=tiles),
            hopper.weight_gradient(x, dy, sizes, tiles=tiles))


def check(arguments, tiles):
  got, used = run(*arguments, tiles), int(arguments[2].sum())
  for a, b in zip((got[0][:used], got[1][:used], got[2]), group_products(*arguments), strict=True):
    close(a, b, arguments[0].dtype if a.ndim == 2 else None)
  return got


def close(got, expected, rounded_to):
  # Rounding is off by at most half a unit of the last place; the rest is float32 additions of at most 768 products.
  rtol = 0. if rounded_to is None else jnp.finfo(rounded_to).eps / 2
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=rtol,
                             atol=BLOCKS * ROWS * 2**-24 * np.abs(expected).max())


@interprets
def test_products_equal_the_groups_and_nan_in_unused_blocks_has_no_effect():
  check(draw((1, 3, 1)), HopperTiles(128, 64, 2, 1))


@interprets
def test_one_group_has_all_rows_and_the_matrices_of_the_others_get_exact_zeros_written_by_the_kernel():
  y, dx, dw = check(draw((1, 3, 1), empty=[0, 2]), HopperTiles(128, 64, 2, 1))
  for empty in slice(ROWS), slice(4 * ROWS, 5 * ROWS):
    assert not y[empty].any() and not dx[empty].any()
  assert not dw[0].any() and not dw[2].any() and dw[1].all()


@interprets
def test_blocks_that_no_group_uses_are_not_computed():
  y, dx, _ = check(draw((1, 1, 1), unused=1.), HopperTiles(128, 64, 2, 1))
  assert jnp.isnan(y[3 * ROWS:]).all() and jnp.isnan(dx[3 * ROWS:]).all()


@interprets
def test_blocks_of_threads_in_pairs_share_an_operand_and_compute_the_same():
  check(draw((1, 3, 1)), HopperTiles(64, 64, 2, 1, pair=True))


@interprets
def test_one_tile_is_enough_where_there_are_more_processors_and_more_stages_than_steps():
  check(draw((1,), width=(64, 64)), HopperTiles(64, 64, 4, 1))


@interprets
def test_float16_keeps_its_three_more_bits():
  x, w, sizes, dy = draw((1, 2, 1), dtype='float16')
  with interpreted('gpu'):
    y = hopper.matmul(x, w, sizes, tiles=HopperTiles(128, 128, 2, 8))
  close(y[:4 * ROWS], group_products(x, w, sizes, dy)[0], jnp.float16)


@interprets
@pytest.mark.parametrize('activation', ['gelu', 'swiglu'])
def test_up_is_the_products_and_their_activation_before_rounding(activation):
  x, wi, sizes, _ = draw((1, 2, 2))
  wg = wi[::-1] if activation in GATES else None
  with interpreted('gpu'):
    hidden, zi, zg = hopper.up(x, wi, wg, sizes, activation)
  used = int(sizes.sum())
  zi64 = group_products(x, wi, sizes, x)[0]
  close(zi[:used], zi64, 'bfloat16')
  if wg is None:
    assert zg is None
    close(hidden[:used], scalar_activation('gelu', zi64)[0], 'bfloat16')
  else:
    zg64 = group_products(x, wg, sizes, x)[0]
    close(zg[:used], zg64, 'bfloat16')
    close(hidden[:used], scalar_activation('silu', zg64)[0] * zi64, 'bfloat16')


@pytest.mark.parametrize('activation', [*ACTIVATIONS, *GATES])
def test_activations_in_kernels_equal_the_experts(activation):
  x = jnp.linspace(-20, 20, 4001)
  # The cubic in GELU is up to 300 here, and rounding it moves an exponent by as many units of the last place.
  expected = (ACTIVATIONS | GATES)[activation](x)
  np.testing.assert_allclose(hopper.IN_KERNEL[activation](x), expected, rtol=1e-4, atol=1e-6)


@interprets
def test_8_bit_products_equal_products_of_the_dequantised_values():
  x, w, sizes, _ = draw((1, 2, 2), width=(256, 128), dtype='float32')
  rows, matrices = fp8.quantize_rows(x), fp8.quantize_matrices(w)
  with interpreted('gpu'):
    y = hopper_fp8.matmul(*rows, *matrices, sizes, jnp.float32)
  x, w = fp8.dequantized_rows(*rows), fp8.dequantized_matrices(*matrices)
  close(y[:int(sizes.sum())], group_products(x, w, sizes, y)[0], None)


@pytest.mark.parametrize('kernel', tuning.KERNELS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_candidates_are_distinct_and_cover_the_output_with_little_to_spare(kernel, shape):
  options = hopper.candidates(kernel, shape)
  assert 1 < len(options) == len(set(options))
  outer = shape.inner if kernel == 'transposed' else shape.outer
  first = options[0].block_n // (2 if kernel == 'up' else 1)
  assert -(-outer // first) * first < 1.1 * outer or first == 64


def test_wide_outputs_get_the_widest_tiles_and_all_shared_memory_goes_to_stages():
  assert hopper.candidates('matmul', SHAPES[0])[0] == HopperTiles(256, 64, 4, 8)
  # 4 stages of (128 + 256) x 64 numbers of 16 bits, and 32 KiB of buffers for what leaves: one more would not fit.
  assert 4 * 384 * 64 * 2 + 32 * 1024 <= 227 * 1024 < 5 * 384 * 64 * 2 + 32 * 1024


@pytest.mark.parametrize('tiles, message', [
    (dict(block_n=256, block_k=64, stages=5, panel=8), 'bytes of shared memory; a Hopper GPU has 232448'),
    (dict(block_n=96, block_k=64, stages=2, panel=8), 'multiples of 64'),
    (dict(block_n=320, block_k=64, stages=2, panel=8), 'at most 256'),
])
def test_tiles_beyond_what_hopper_has_are_refused(tiles, message):
  with pytest.raises(ValueError, match=message):
    HopperTiles(**tiles)


@pytest.mark.parametrize('target, change, words', [
    (Target('cpu', 'cpu'), {}, ['NVIDIA', 'use xla']),
    (Target('tpu', 'TPU v5 lite'), {}, ['TPU v5 lite', 'use pallas_tpu']),
    (Target('gpu', 'NVIDIA A100-SXM4-80GB'), {}, ['A100', 'use Triton']),
    (H100, dict(dtype='float32'), ['not float32', 'use Triton']),
    (H100, dict(inner=72), ['multiples of 64', '72', 'Triton']),
    (H100, {}, None), (H100, dict(dtype='float16'), None), (Target('gpu', 'NVIDIA H200'), {}, None),
])
def test_limits_name_the_problem_and_an_alternative(target, change, words):
  limit = hopper.limit(target, SHAPES[0]._replace(**change))
  assert (limit is None) == (words is None)
  assert words is None or all(word in limit for word in words) and limit.count('. ') == 0
