"""The compiler for TPUs accepts the kernels, on a machine without one: layouts, alignment, memory, for four chips.

libtpu compiles for a chip that is only described (extra `compile`). What it accepts is what would run; interpreted
tests (`test_tpu_kernels.py`) say that it would be right. Temporaries are bounded by 2 MiB, which is less than any array
that the kernels are given: no matrix is transposed or copied outside of them, and no rows are. The benchmark that
compares the kernels with megablox's is tested here, too: its counts are those of a walk over the grids.
"""
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('libtpu', reason="compiles for TPU with libtpu: pip install -e '.[compile]'")

from experiments.dispatch_benchmark import tpu
from moejax.kernels import padding, pallas_tpu, tpu_tiles
from moejax.kernels.tpu_tiles import TPUTiles


def products(M, E, D, F, dtype):
  """Each kernel with shapes of its arguments."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  rows, sizes, w = padding.padded_rows(M, E, tpu_tiles.ROWS), jax.ShapeDtypeStruct((E,), jnp.int32), array(E, D, F)
  return {
      'forward': (pallas_tpu.matmul, (array(rows, D), w, sizes)),
      'dX': (functools.partial(pallas_tpu.matmul, transpose=True), (array(rows, F), w, sizes)),
      'dW': (pallas_tpu.weight_gradient, (array(rows, D), array(rows, F), sizes)),
      'gated': (lambda x, wi, wg, sizes: pallas_tpu.up(x, wi, wg, sizes, 'swiglu'), (array(rows, D), w, w, sizes)),
      'plain': (lambda x, wi, sizes: pallas_tpu.up(x, wi, None, sizes, 'gelu'), (array(rows, D), w, sizes)),
  }


def check(chip, function, arguments):
  compiled = tpu.compile_for(tpu.CHIPS[chip], function, *arguments)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
  assert compiled.memory_analysis().temp_size_in_bytes < 2**21


@pytest.mark.parametrize('chip, product', [('v4', 'forward'), ('v5e', 'dX'), ('v5p', 'dW'), ('v6e', 'gated')])
def test_small_experts_compile(chip, product):
  check(chip, *products(4096, 4, 512, 1024, jnp.bfloat16)[product])


# Mixtral 8x7B, OLMoE, V-MoE-B/32 and DeepSeekMoE 16B: widths of the experts, and how many.
REAL = [((8192, 8, 4096, 14336), 'bfloat16'), ((8192, 8, 4096, 14336), 'float32'), ((65536, 64, 2048, 1024), 'bfloat16'),
        ((25088, 32, 768, 3072), 'bfloat16'), ((65536, 64, 2048, 1408), 'bfloat16')]
# Every product of every width, on the chips in turn: each chip sees every product and every width.
CASES = [(list(tpu.TOPOLOGIES)[(i + j) % len(tpu.TOPOLOGIES)], *case, product) for i, case in enumerate(REAL)
         for j, product in enumerate(('forward', 'dX', 'dW', 'gated', 'plain'))]


@pytest.mark.slow
@pytest.mark.parametrize('chip, shape, dtype, product', CASES)
def test_experts_of_real_widths_compile(chip, shape, dtype, product):
  check(chip, *products(*shape, jnp.dtype(dtype))[product])


def test_the_compiled_program_reports_the_work_and_traffic_of_its_tiles():
  function, arguments = products(4096, 4, 512, 1024, jnp.bfloat16)['forward']
  cost = tpu.compile_for(tpu.CHIPS['v5e'], function, *arguments).cost_analysis()
  rows = arguments[0].shape[0]
  tiles = tpu_tiles.row_tiles('TPU v5 lite', 512, 1024, 'bfloat16')
  # The experts of blocks are found outside of the kernel: some hundred numbers.
  assert cost['flops'] == pytest.approx(2 * rows * 512 * 1024, rel=1e-3)
  assert cost['bytes accessed'] == pytest.approx(tpu_tiles.row_traffic(rows, 4, 512, 1024, tiles, 2), rel=0.03)


CHIP = dataclasses.replace(tpu.CHIPS['v5e'], peak=1e12, bandwidth=1e12)


@pytest.mark.parametrize('tk', [128, 256])
def test_the_work_of_megablox_equals_a_loop_over_its_grid(tk):
  """Groups of 300 and 212 rows in tiles of 256: the first lies in two tiles, the second in one of these."""
  experts, visits, tm, tn = tpu.Experts(512, 2, 256, 512), [(0, 0), (0, 1), (1, 1)], 256, 256  # (group, tile of rows)
  copied, before = 2 * 512 * 512, ((), ())
  for column, (group, tile), part in itertools.product(range(2), visits, range(256 // tk)):
    now = (tile, part), (group, part, column)
    copied += 2 * tk * (tm * (now[0] != before[0]) + tn * (now[1] != before[1]))
    before = now
  work = tpu.megablox_work('forward', experts, CHIP, (tm, tk, tn), np.array([300, 212]))
  assert (work.flops, work.steps) == (2 * 3 * 256 * 256 * 512, 2 * 3 * 256 // tk)
  assert work.bytes == copied


@pytest.mark.parametrize('product, tiles', [('forward', TPUTiles(128, 256, 256)), ('dW', TPUTiles(128, 256, 256)),
                                            ('up', TPUTiles(256, 512, 256)), ('dX', TPUTiles(256, 128, 128, resident=False))])
def test_our_work_copies_the_traffic_of_the_tiles(product, tiles):
  """Groups of 300, 0 and 212 rows have two, one and one blocks."""
  experts = tpu.Experts(512, 3, 256, 512)
  work = tpu.our_work(product, experts, CHIP, tiles, np.array([300, 0, 212]))
  inner, outer = (512, 256) if product == 'dX' else (256, 512)
  many = dict(matrices=2, outputs=3) if product == 'up' else {}
  traffic = (tpu_tiles.gradient_traffic(4 * 256, 3, inner, outer, tiles, 2) if product == 'dW' else
             tpu_tiles.row_traffic(4 * 256, 3, inner, outer, tiles, 2, **many))
  assert work.bytes == traffic
  assert work.flops == 2 * 4 * 256 * 256 * 512 * (2 if many else 1)


def test_a_step_takes_the_longer_of_its_product_and_its_copies():
  assert tpu.work(CHIP, 10, np.array([5, 20, 10]), times=2) == (60, 70, 6, pytest.approx(2 * (10 + 20 + 10) * 1e-12))
