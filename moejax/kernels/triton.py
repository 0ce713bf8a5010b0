"""Grouped matmul in Pallas Triton, for NVIDIA GPUs before Hopper, and in float32 for all NVIDIA GPUs.

Float32 is IEEE float32, never TF32. Blocks have 128 rows: a tile of 128 x 128 does 64 operations per byte read from the
L2 cache, about enough to keep an A100 busy; 64 x 128 would not. JAX has deprecated Pallas Triton in favour of Mosaic
GPU, which supports tensor cores before Hopper (`plgpu.mma`) in 0.12 but not in 0.10: once moejax requires the newer
version, this can move.
"""
import dataclasses
import itertools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from moejax.kernels import padding, tuning
from moejax.kernels.choice import Implementation, Shape
from moejax.kernels.target import Target, target

ROWS = 128
_DTYPES = ('bfloat16', 'float16', 'float32')
_SHARED_BYTES = 163 * 1024  # maximum per block on an A100; GPUs with less fail at compilation
_NEIGHBOURS = 8  # blocks of rows that run together on one panel of a matrix, so that it stays in the L2 cache


@dataclasses.dataclass(frozen=True)
class TritonTiles:
  """Tile sizes of a product: `block_n` columns of the output, in steps of `block_k` of which `stages` are being loaded,
  by `warps` times 32 threads. Tiles have 128 rows, or fewer in a weight gradient with fewer rows."""
  block_n: int
  block_k: int
  warps: int
  stages: int


def matmul(x: Float[Array, 'M inner'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'], transpose: bool = False,
           *, tiles: TritonTiles | None = None) -> Float[Array, 'M outer']:
  """x: <float>[M,D], w: <float>[E,D,F] -> <float>[M,F]; transposed, x: <float>[M,F] -> <float>[M,D].

  Groups are padded to multiples of 128 rows; outputs after the last group are undefined.
  """
  kernel = 'transposed' if transpose else 'matmul'
  chosen = tiles or _tiles(kernel, x, w.shape)
  _, inner, outer = w.shape
  depth, width = (outer, inner) if transpose else (inner, outer)
  blocks, columns = x.shape[0] // ROWS, width // chosen.block_n
  expert, used = padding.block_experts(group_sizes, ROWS, blocks)

  def body(expert_ref, used_ref, x_ref, w_ref, y_ref):
    block, column = _side_by_side(pl.program_id(0), blocks, columns)

    @pl.when(block < used_ref[0])
    def _():
      e, rows, cols = expert_ref[block], _slice(block, ROWS), _slice(column, chosen.block_n)

      def step(k, total):
        at = _slice(k, chosen.block_k)
        matrix = w_ref[e, cols, at] if transpose else w_ref[e, at, cols]
        return total + plt.dot(x_ref[rows, at], matrix, trans_b=transpose, allow_tf32=False)

      total = lax.fori_loop(0, depth // chosen.block_k, step, jnp.zeros((ROWS, chosen.block_n), jnp.float32))
      y_ref[rows, cols] = total.astype(y_ref.dtype)

  return _call(body, (blocks * columns,), jax.ShapeDtypeStruct((x.shape[0], width), x.dtype), chosen,
               f'moejax_{kernel}')(expert, used[None], x, w)


def weight_gradient(x: Float[Array, 'M D'], dy: Float[Array, 'M F'], group_sizes: Int[Array, 'E'], *,
                    tiles: TritonTiles | None = None) -> Float32[Array, 'E D F']:
  """x: <float>[M,D], dy: <float>[M,F] -> <float32>[E,D,F]; groups are padded to multiples of 128 rows."""
  groups, inner, outer = group_sizes.shape[0], x.shape[1], dy.shape[1]
  chosen = tiles or _tiles('weight_gradient', x, (groups, inner, outer))
  block_m, end = _power_of_two(inner, ROWS), jnp.cumsum(group_sizes).astype(jnp.int32)

  def body(start_ref, end_ref, x_ref, dy_ref, dw_ref):
    e, ins, outs = pl.program_id(2), _slice(pl.program_id(1), block_m), _slice(pl.program_id(0), chosen.block_n)

    def step(k, total):
      at = _slice(k, chosen.block_k)
      return total + plt.dot(x_ref[at, ins], dy_ref[at, outs], trans_a=True, allow_tf32=False)

    dw_ref[e, ins, outs] = lax.fori_loop(start_ref[e] // chosen.block_k, end_ref[e] // chosen.block_k, step,
                                         jnp.zeros((block_m, chosen.block_n), jnp.float32))

  # The first axis of a Triton grid varies fastest, so all tiles of one expert run together and share its rows.
  grid = (outer // chosen.block_n, inner // block_m, groups)
  return _call(body, grid, jax.ShapeDtypeStruct((groups, inner, outer), jnp.float32), chosen,
               'moejax_weight_gradient')(end - group_sizes.astype(jnp.int32), end, x, dy)


def limit(target: Target, shape: Shape) -> str | None:
  """One sentence on why the target cannot run the shape, and what can; None if it can."""
  if target.platform != 'gpu' or not (target.interpret or target.kind.startswith('NVIDIA')):
    return (f'Triton kernels are for NVIDIA GPUs from Ampere on, not for {target.kind!r}: use xla on CPUs and '
            'ragged_dot on other devices.')
  if jnp.dtype(shape.dtype).name not in _DTYPES:
    return f'Triton kernels support {", ".join(_DTYPES)}, not {jnp.dtype(shape.dtype).name}: use ragged_dot.'
  if shape.inner % 16 or shape.outer % 16:
    return (f'Triton kernels need widths that are multiples of 16, not {shape.inner} and {shape.outer}: round them up, '
            'or use ragged_dot.')
  return None


def candidates(kernel: str, shape: Shape) -> list[TritonTiles]:
  """Tiles for a kernel of `tuning.KERNELS` that divide the shape and fit an A100; the first is the default."""
  size = jnp.dtype(shape.dtype).itemsize
  depth, width = {'matmul': (shape.inner, shape.outer), 'transposed': (shape.outer, shape.inner),
                  'weight_gradient': (ROWS, shape.outer)}[kernel]

  def fits(tiles):
    operands = tiles.stages * (ROWS + tiles.block_n) * tiles.block_k * size
    result = ROWS * tiles.block_n * (4 if kernel == 'weight_gradient' else size)
    sums = ROWS * tiles.block_n // (32 * tiles.warps)
    # Beyond this, threads exceed their 255 registers, which without tensor cores (float32) also hold the operands.
    registers = sums <= 128 if size == 2 else tiles.block_k <= 32 and sums * tiles.block_k <= 2048
    return (depth % tiles.block_k == 0 and width % tiles.block_n == 0 and max(operands, result) <= _SHARED_BYTES
            and registers)

  # These need 64 KiB of shared memory, which smaller GPUs than an A100 have too.
  block_k, warps, stages = (32, 4, 4) if size == 2 else (16, 8, 3)
  first = TritonTiles(_power_of_two(width, 128), _power_of_two(depth, block_k), warps, stages)
  others = itertools.starmap(TritonTiles, itertools.product((256, 128, 64), (64, 32, 16), (4, 8), (2, 3, 4, 5)))
  return [first] + [tiles for tiles in others if fits(tiles) and tiles != first]


def _tiles(kernel: str, x: jax.Array, matrices: tuple[int, ...]) -> TritonTiles:
  # Tables count rows before padding.
  experts, inner, outer = matrices
  shape = Shape(x.shape[0] - experts * ROWS, experts, inner, outer, x.dtype)
  return tuning.choose('triton', kernel, shape, candidates(kernel, shape))


def _power_of_two(width, most):
  # The largest power of two, at most `most`, that divides `width`.
  return min(width & -width, most)


def _slice(index, size):
  return pl.ds(index * size, size)


def _side_by_side(program, blocks, columns):
  # The blocks of rows and columns of a program: down `_NEIGHBOURS` blocks of rows, then to the next column.
  first = program // (_NEIGHBOURS * columns) * _NEIGHBOURS
  height = jnp.minimum(blocks - first, _NEIGHBOURS)
  within = program % (_NEIGHBOURS * columns)
  return first + within % height, within // height


def _call(body, grid, out_shape, tiles, name):
  parameters = plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
  return pl.pallas_call(body, grid=grid, out_shape=out_shape, compiler_params=parameters, name=name,
                        interpret=target().interpret)


IMPLEMENTATION = Implementation(matmul, weight_gradient, limit, row_multiple=ROWS)
