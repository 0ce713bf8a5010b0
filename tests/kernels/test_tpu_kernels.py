"""TPU kernels, interpreted on CPU, equal a float64 loop over experts; and their tiles fit the chips they are for.

The oracle is `loop` below, on the padded layout that kernels work on: groups of whole blocks, an empty group having
one block of zero rows, and NaN in the rows of blocks that no group uses. Most tests use the plain interpreter; one uses
JAX's interpreter of TPUs, in which copies take time and memory is NaN until it is written.
"""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels import pallas_tpu, tpu_tiles
from moejax.kernels.choice import Shape
from moejax.kernels.target import Target, interpreted
from moejax.kernels.tpu_tiles import GENERATIONS, LANES, TPUTiles

D, F, E, BLOCKS = 256, 384, 4, 8
V5E = 'TPU v5 lite'
# Blocks of rows by group. Of the second, all but one group are empty.
PATTERNS = {'even': [2, 2, 2, 2], 'one group has all': [1, 5, 1, 1], 'unused': [3, 1, 1, 1], 'fewest': [1, 1, 1, 1]}
EMPTY = {'one group has all': [0, 2, 3], 'unused': [1]}


@pytest.fixture
def small(monkeypatch):
  """Interpreted kernels use the tiles of a chip so small that every loop has several steps."""
  monkeypatch.setitem(GENERATIONS, V5E, tpu_tiles.Generation(vmem=2_600_000, mxu=128, cores=2))
  monkeypatch.setattr(tpu_tiles, 'UNROLLED', {2: 128 * 128, 4: 128 * 128})


@pytest.fixture
def tiles(request, monkeypatch):
  if request.param == 'resident tiles':
    request.getfixturevalue('small')
  if request.param == 'read for each block':
    monkeypatch.setattr(tpu_tiles, 'row_tiles', lambda *_, **__: TPUTiles(128, 128, 128, resident=False))


def draw(pattern, dtype, D=D, F=F, blocks=BLOCKS):
  """x, wi, wg, group_sizes and dy."""
  rng, rows = np.random.RandomState(0), tpu_tiles.ROWS
  group = np.repeat(np.arange(len(PATTERNS[pattern]) + 1), [*PATTERNS[pattern], blocks - sum(PATTERNS[pattern])])
  group = np.repeat(group, rows)[:, None]
  in_blocks = lambda width: np.select([np.isin(group, EMPTY.get(pattern, [])), group == E], [0., np.nan],
                                      rng.randn(blocks * rows, width))
  matrices = lambda: jnp.asarray(rng.randn(E, D, F) / np.sqrt(D), dtype)
  return (jnp.asarray(in_blocks(D), dtype), matrices(), matrices(),
          jnp.array(PATTERNS[pattern], jnp.int32) * rows, jnp.asarray(in_blocks(F), dtype))


def loop(x, wi, wg, group_sizes, dy):
  """y, dx, dw, and zg = x wg, in float64; rows after the last group are left out."""
  x, wi, wg, dy = (np.asarray(a, np.float64) for a in (x, wi, wg, dy))
  ends = np.cumsum(group_sizes)
  groups = [slice(end - size, end) for end, size in zip(ends, group_sizes)]
  by_group = lambda rows, matrix: np.concatenate([rows[group] @ matrix[e] for e, group in enumerate(groups)])
  return (by_group(x, wi), by_group(dy, wi.swapaxes(1, 2)), np.stack([x[group].T @ dy[group] for group in groups]),
          by_group(x, wg))


def compiled():
  """A function of what `draw` makes; a new one each time, as jax keeps what it traced, and tiles differ by test."""
  @jax.jit
  def run(x, wi, wg, group_sizes, dy):
    with interpreted('tpu'):
      return dict(y=pallas_tpu.matmul(x, wi, group_sizes), dx=pallas_tpu.matmul(dy, wi, group_sizes, transpose=True),
                  dw=pallas_tpu.weight_gradient(x, dy, group_sizes),
                  plain=pallas_tpu.up(x, wi, None, group_sizes, 'gelu'),
                  gated=pallas_tpu.up(x, wi, wg, group_sizes, 'swiglu'))
  return run


def check(got, data):
  x = data[0]
  y, dx, dw, zg = loop(*data)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  gelu = y * sigmoid(2 * np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))  # (1 + tanh z) / 2 = sigmoid(2 z)
  swiglu = zg * sigmoid(zg) * y

  def equal(a, b, dtype):
    assert a.dtype == dtype
    # Sums of at most 2048 float32 numbers below 16, passed through slopes below 4; and one rounding to 8 bits.
    np.testing.assert_allclose(np.asarray(a, np.float64)[:len(b)], b, rtol=2**-8 if dtype == jnp.bfloat16 else 2**-20,
                               atol=2048 * 16 * 4 * 2**-24 * 0.05)

  equal(got['y'], y, x.dtype)
  equal(got['dx'], dx, x.dtype)
  equal(got['dw'], dw, jnp.float32)
  assert got['plain'][2] is None
  for name, expected in dict(plain=(gelu, y), gated=(swiglu, y, zg)).items():
    for a, b in zip(got[name], expected):
      equal(a, b, x.dtype)


@pytest.mark.parametrize('tiles, dtype', [('one tile', 'float32'), ('resident tiles', 'float32'),
                                          ('resident tiles', 'bfloat16'), ('read for each block', 'float32')],
                         indirect=['tiles'])
def test_kernels_equal_the_loop_over_experts(tiles, dtype):
  run = compiled()
  for pattern in PATTERNS:
    data = draw(pattern, dtype)
    got = run(*data)
    check(got, data)
    for e in EMPTY.get(pattern, []):
      assert not got['dw'][e].any()


def test_copies_arrive_before_they_are_read_and_memory_is_written_before(small):
  """The interpreter of TPUs, with two cores: copies happen when they are waited for, memory is NaN until written."""
  data = draw('unused', 'float32', D=256, F=256, blocks=7)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
    check(compiled()(*data), data)


def test_on_a_small_chip_every_loop_has_several_steps(small):
  """The assumptions of the tests above."""
  up = tpu_tiles.row_tiles(V5E, D, F, 'float32', matrices=2, outputs=3)
  assert up.resident and up.inner < D and up.outer < F
  down = tpu_tiles.row_tiles(V5E, F, D, 'float32')
  assert down.resident and down.inner < F and D // down.outer == 2
  gradient = tpu_tiles.gradient_tiles(V5E, D, F, 'float32')
  assert gradient.inner < D and gradient.chunk < gradient.outer


widths = st.integers(1, 128).map(lambda n: n * LANES)


@given(kind=st.sampled_from(list(GENERATIONS)), inner=widths, outer=widths,
       dtype=st.sampled_from(['bfloat16', 'float32']), up=st.booleans())
@example(kind='TPU v4', inner=16384, outer=16384, dtype='float32', up=True)
@example(kind='TPU v6 lite', inner=4096, outer=14336, dtype='bfloat16', up=True)
def test_tiles_fit_into_memory_and_divide_their_axes(kind, inner, outer, dtype, up):
  of, rows, size = GENERATIONS[kind], tpu_tiles.ROWS, jnp.dtype(dtype).itemsize
  matrices, outputs = (2, 3) if up else (1, 1)
  tiles = tpu_tiles.row_tiles(kind, inner, outer, dtype, matrices=matrices, outputs=outputs)
  gradient = tpu_tiles.gradient_tiles(kind, inner, outer, dtype)

  # Two of all that is read or written, and float32 sums where the contraction is in parts.
  read = rows * tiles.inner + matrices * (inner if tiles.resident else tiles.inner) * tiles.outer
  written = outputs * rows * tiles.outer
  sums = 4 * matrices * rows * tiles.outer if tiles.inner < inner else 0
  assert 2 * size * (read + written) + sums <= of.vmem * 3 / 4
  read = rows * (gradient.inner + gradient.outer)
  assert 2 * (size * read + 4 * gradient.inner * gradient.outer) <= of.vmem * 3 / 4

  for chosen in tiles, gradient:
    assert inner % chosen.inner == 0 and outer % chosen.outer == 0
    for part, whole in (chosen.inner, inner), (chosen.outer, outer):
      assert part % (of.mxu if whole % of.mxu == 0 else LANES) == 0
    assert chosen.chunk == chosen.outer or chosen.chunk % min(of.mxu, chosen.outer) == 0 < chosen.chunk < chosen.outer


def test_matrices_that_fit_are_one_tile():
  assert tpu_tiles.row_tiles(V5E, 2048, 1024, 'bfloat16') == TPUTiles(2048, 1024, 1024)


def test_a_contraction_too_long_for_a_small_chip_is_not_resident():
  """Of 14336 bfloat16, 12 MiB hold 128 columns twice: rows would be read 32 times."""
  assert not tpu_tiles.row_tiles('TPU v4', 14336, 4096, 'bfloat16').resident
  assert tpu_tiles.row_tiles('TPU v5', 14336, 4096, 'bfloat16').resident


def walk(grid, *index_maps):
  """How often a block of each differs from the one before, over a grid."""
  points = list(itertools.product(*map(range, grid)))
  count = lambda index: 1 + sum(index(*a) != index(*b) for a, b in itertools.pairwise(points))
  return [count(index) for index in index_maps]


@pytest.mark.parametrize('resident', [True, False])
def test_the_traffic_of_rows_equals_a_loop_over_the_grid(resident):
  """7 blocks of 3 experts; bfloat16; 2 matrices [512, 768] in tiles of [256, 384]; 3 outputs."""
  expert = [0, 0, 0, 1, 2, 2, 2]
  tiles, rows = TPUTiles(256, 384, 384, resident), tpu_tiles.ROWS
  x, w, y = walk((2, 7, 2), lambda column, block, step: (block, step),
                 lambda column, block, step: (expert[block], column, None if resident else step),
                 lambda column, block, step: (block, column))
  copied = 2 * (x * rows * 256 + 2 * w * (512 if resident else 256) * 384 + 3 * y * rows * 384)
  assert tpu_tiles.row_traffic(7 * rows, 3, 512, 768, tiles, 2, matrices=2, outputs=3) == copied


def test_the_traffic_of_gradients_equals_a_loop_over_the_grid():
  """7 blocks of 3 experts; bfloat16, with a float32 gradient [3, 512, 768] in tiles of [256, 384]."""
  expert = [0, 0, 0, 1, 2, 2, 2]
  rows = tpu_tiles.ROWS
  x, dy, dw = walk((2, 2, 7), lambda i, o, block: (block, i), lambda i, o, block: (block, o),
                   lambda i, o, block: (expert[block], i, o))
  copied = 2 * rows * (x * 256 + dy * 384) + 4 * dw * 256 * 384
  assert tpu_tiles.gradient_traffic(7 * rows, 3, 512, 768, TPUTiles(256, 384, 384), 2) == copied


def test_cores_of_a_chip_share_the_tiles():
  """1024 columns would fit at once, but then one of the two cores had nothing to do."""
  assert tpu_tiles.row_tiles('TPU v5', 1024, 1024, 'bfloat16') == TPUTiles(1024, 512, 512)


@pytest.mark.parametrize('kind, version', [('TPU v4', 'TPU_V4'), (V5E, 'TPU_V5E'), ('TPU v5', 'TPU_V5P'),
                                           ('TPU v6 lite', 'TPU_V6E')])
def test_chips_are_as_jax_describes_them(kind, version):
  of = GENERATIONS[kind]
  info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], of.cores)
  assert (of.vmem, of.mxu) == (info.vmem_capacity_bytes, info.mxu_column_size)
  assert pltpu.ChipVersion[version].num_physical_tensor_cores_per_chip == of.cores


@pytest.mark.parametrize('target, shape, sentence', [
    (Target('cpu', 'cpu'), Shape(512, 4, 128, 128, 'float32'), "'pallas_tpu' runs on TPU, not on cpu: use 'xla'."),
    (Target('gpu', 'NVIDIA H100'), Shape(512, 4, 128, 128, 'float32'),
     "'pallas_tpu' runs on TPU, not on gpu: use 'ragged_dot'."),
    (Target('tpu', V5E), Shape(512, 4, 100, 128, 'float32'),
     "'pallas_tpu' needs widths that are multiples of 128, not 100 and 128: use 'ragged_dot'."),
    (Target('tpu', V5E), Shape(512, 4, 128, 128, 'float16'),
     "'pallas_tpu' multiplies bfloat16 and float32, not float16: use 'ragged_dot'."),
    (Target('tpu', 'TPU v3'), Shape(512, 4, 128, 128, 'float32'),
     "'pallas_tpu' has no tiles for this chip, TPU v3 is not one of TPU v4, TPU v5 lite, TPU v5, TPU v6 lite: "
     "use 'ragged_dot'."),
])
def test_a_limit_is_one_sentence_that_names_it_and_what_would_work(target, shape, sentence):
  assert pallas_tpu.limit(target, shape) == sentence


@pytest.mark.parametrize('kind', [*GENERATIONS, 'interpreted'])
@pytest.mark.parametrize('inner, outer', [(4096, 14336), (2048, 1024), (768, 3072)])
def test_common_experts_have_no_limit(kind, inner, outer):
  assert pallas_tpu.limit(Target('tpu', kind), Shape(8192, 8, inner, outer, jnp.bfloat16)) is None
