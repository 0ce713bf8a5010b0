"""Grouped matmul for NVIDIA Hopper GPUs in Pallas Mosaic GPU, on blocks of 128 rows of one expert.

The grid is persistent: one thread block per multiprocessor computes output tiles one after another (`hopper_pipeline`).
Tiles are ordered in panels: all blocks of rows for a few columns of a matrix, which stay in the L2 cache. Transposed
operands are read transposed by the tensor cores, never copied. Sums are float32, rounded once.
"""
import dataclasses
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from moejax.kernels import hopper_pipeline, padding, tuning
from moejax.kernels.choice import Implementation, Shape
from moejax.kernels.expert_block import Activation
from moejax.kernels.hopper_pipeline import Tile
from moejax.kernels.target import Target

ROW_MULTIPLE = hopper_pipeline.ROWS
_WIDTH = 64  # columns per copy: 128 bytes, as wgmma reads them
_SUMS = 256  # columns of accumulators; 128 of the 232 registers of a thread
# The functions of `activations` without custom derivatives, which kernels do not support. The hardware's exponential is
# accurate to 22 bits and its tanh to 11, so GELU uses (1 + tanh(x)) / 2 = sigmoid(2 x).
_ACTS = {'gelu': lambda x: x * jax.nn.sigmoid(2 * (2 / math.pi)**.5 * (x + 0.044715 * x * x * x)),
         'relu': lambda x: jnp.maximum(x, 0.), 'silu': lambda x: x * jax.nn.sigmoid(x),
         'squared_relu': lambda x: jnp.square(jnp.maximum(x, 0.))}
IN_KERNEL = _ACTS | {'geglu': _ACTS['gelu'], 'reglu': _ACTS['relu'], 'swiglu': _ACTS['silu']}
_KINDS = ('H100', 'H200', 'H800', 'H20', 'GH200')


@dataclasses.dataclass(frozen=True)
class HopperTiles:
  """Tile sizes of a product.

  Attributes:
    block_n: columns of sums per thread block, of 128 rows each; if two matrices are multiplied at once, half for each.
      With 256 the tensor cores do 85 operations per byte read from the L2 cache, with 128 they do 64; but 256 wastes
      work if the output is narrow.
    block_k: size of the contraction in one step.
    stages: steps whose operands are in shared memory at once: one being multiplied, the others being copied.
    panel: number of adjacent tiles across the columns that run before the next row of tiles.
    pair: whether two blocks share the operand their tiles have in common (the rows, or `dy` in a weight gradient).

  Raises:
    ValueError: the tiles need more than Hopper has.
  """
  block_n: int
  block_k: int
  stages: int
  panel: int
  pair: bool = False

  def __post_init__(self):
    if self.block_n % _WIDTH or self.block_k % _WIDTH or not 0 < self.block_n <= _SUMS:
      raise ValueError(f'{self}: block_n and block_k must be multiples of {_WIDTH}, and block_n at most {_SUMS}.')
    if (used := _shared_bytes(self.block_n, self.block_k, self.stages)) > hopper_pipeline.SHARED_BYTES:
      raise ValueError(f'{self} needs {used} bytes of shared memory; a Hopper GPU has {hopper_pipeline.SHARED_BYTES}.')


def candidates(kernel: str, shape: Shape) -> list[HopperTiles]:
  """Tiles for a kernel of `tuning.KERNELS`, best guess first: least work, then the widest."""
  outer = shape.inner if kernel == 'transposed' else shape.outer
  matrices = 2 if kernel == 'up' else 1
  # Rough time of a tile: its columns, plus the copy of its rows.
  cost = lambda block_n: (pl.cdiv(outer * matrices, block_n) * (block_n + 64), -block_n)
  block_k, result = _WIDTH, []
  for block_n in sorted(range(_WIDTH * matrices, _SUMS + 1, _WIDTH * matrices), key=cost)[:2]:
    stages = max(n for n in range(1, 9) if _shared_bytes(block_n, block_k, n) <= hopper_pipeline.SHARED_BYTES)
    columns = pl.cdiv(outer * matrices, block_n)
    halves = pl.cdiv(shape.inner, ROW_MULTIPLE) if kernel == 'weight_gradient' else columns
    for pair in (False,) if halves % 2 else (False, True):
      across = columns if kernel == 'weight_gradient' else columns // (1 + pair)
      result.extend(HopperTiles(block_n, block_k, stages, panel, pair)
                    for panel in dict.fromkeys(min(panel, across) for panel in (8, 16, 4)))
  return result


def limit(target: Target, shape: Shape) -> str | None:
  """One sentence on why the target cannot run the shape, and what can; None if it can."""
  if target.platform != 'gpu':
    other = 'pallas_tpu' if target.platform == 'tpu' else 'xla'
    return f'Hopper kernels are for NVIDIA GPUs, not for {target.kind!r}: use {other}.'
  if target.interpret and not hasattr(plgpu, 'force_gpu_interpret_mode'):
    return f'Interpreting Hopper kernels needs jax 0.11.2 or later; this is {jax.__version__}.'
  if not target.interpret and not any(kind in target.kind for kind in _KINDS):
    return f'Hopper kernels are for {", ".join(_KINDS)}, not for {target.kind!r}: use Triton on other NVIDIA GPUs.'
  if jnp.dtype(shape.dtype) not in (jnp.bfloat16, jnp.float16):
    return (f'Hopper kernels support bfloat16 and float16, not {jnp.dtype(shape.dtype)}, which tensor cores would '
            'round: use Triton.')
  if shape.inner % _WIDTH or shape.outer % _WIDTH:
    return (f'Hopper kernels need widths that are multiples of {_WIDTH}, not {shape.inner} and {shape.outer}: round '
            'them up, or use Triton.')
  return None


def matmul(x: Float[Array, 'M inner'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'], transpose: bool = False,
           *, tiles: HopperTiles | None = None) -> Float[Array, 'M outer']:
  """x: <16 bit float>[M,D], w: [E,D,F] -> [M,F]; transposed, x: [M,F] -> [M,D].

  Groups are whole blocks of 128 rows, none empty (see `padding`); outputs after the last group are undefined.
  """
  kernel = 'transposed' if transpose else 'matmul'
  tiles = tiles or _tiles(kernel, x, w.shape)
  return _rows_times_matrices(kernel, x, [w], group_sizes, lambda y: [y], 1, tiles)[0]


def up(x: Float[Array, 'M D'], wi: Float[Array, 'E D F'], wg: Float[Array, 'E D F'] | None,
       group_sizes: Int[Array, 'E'], activation: Activation, *,
       tiles: HopperTiles | None = None) -> tuple[Float[Array, 'M F'], Float[Array, 'M F'], Float[Array, 'M F'] | None]:
  """The hidden layer act(x wi), or act(x wg) * (x wi), and the pre-activations x wi and x wg, in one pass.

  Args:
    x: <16 bit float>[M,D], in groups as for `matmul`.
    wi: [E,D,F].
    wg: [E,D,F] if the activation is gated, else None.
    group_sizes: <int32>[E].
    activation: applied in float32, to the pre-activations before rounding.
    tiles: None: from `tuning`.

  Returns:
    hidden, x wi and x wg (or None), each [M,F].
  """
  tiles = tiles or _tiles('up', x, wi.shape)
  act = IN_KERNEL[activation]
  if wg is None:
    hidden, zi = _rows_times_matrices('up', x, [wi], group_sizes, lambda zi: [act(zi), zi], 2, tiles)
    return hidden, zi, None
  hidden, zi, zg = _rows_times_matrices('up', x, [wi, wg], group_sizes, lambda zi, zg: [act(zg) * zi, zi, zg], 3,
                                        tiles)
  return hidden, zi, zg


def weight_gradient(x: Float[Array, 'M D'], dy: Float[Array, 'M F'], group_sizes: Int[Array, 'E'], *,
                    tiles: HopperTiles | None = None) -> Float32[Array, 'E D F']:
  """x: <16 bit float>[M,D], dy: [M,F], in groups as for `matmul` -> <float32>[E,D,F]."""
  (rows, inner), outer, experts = x.shape, dy.shape[1], len(group_sizes)
  chosen = tiles or _tiles('weight_gradient', x, (experts, inner, outer))
  grid = pl.cdiv(inner, ROW_MULTIPLE * (1 + chosen.pair)), pl.cdiv(outer, chosen.block_n)
  first_row = jnp.cumsum(group_sizes) - group_sizes
  # Largest groups first, so that small ones even out the load at the end.
  by_size = jnp.argsort(-group_sizes)

  def plan(scalars, operands, results):
    (by_size, first_row, group_sizes), (x, dy), (dw,) = scalars, operands, results

    def tile(n, member):
      e = by_size[lax.div(n, grid[0] * grid[1])]
      down, across = plgpu.planar_snake(lax.rem(n, grid[0] * grid[1]), grid, 1, chosen.panel)
      group = pl.ds(pl.multiple_of(first_row[e], ROW_MULTIPLE), rows)
      down = pl.ds((down * (1 + chosen.pair) + member) * ROW_MULTIPLE, ROW_MULTIPLE)
      across = pl.ds(across * chosen.block_n, chosen.block_n)
      return Tile(lax.div(group_sizes[e], chosen.block_k), [x.at[group, down], dy.at[group, across]],
                  [dw.at[e, down, across]])

    return experts * grid[0] * grid[1], tile

  def multiply(_, step, mine, blocks, sums):
    x, dy = blocks
    plgpu.wgmma(sums[0], x.at[:, mine].transpose((1, 0)), dy)
    plgpu.wgmma_wait(0)
    return sums

  block = lambda columns, shared: hopper_pipeline.operand(
      (chosen.block_k, columns), x.dtype, lambda k: (k, 0), shared=shared)
  return hopper_pipeline.run(
      (x, dy), [a.astype(jnp.int32) for a in (by_size, first_row, group_sizes)],
      [jax.ShapeDtypeStruct((experts, inner, outer), jnp.float32)], name='weight_gradient',
      specs=[block(ROW_MULTIPLE, False), block(chosen.block_n, chosen.pair)], stages=chosen.stages, pair=chosen.pair,
      plan=plan, total=hopper_pipeline.sums_in_registers(chosen.block_n), multiply=multiply, finish=lambda dw: [dw])[0]


IMPLEMENTATION = Implementation(matmul, weight_gradient, limit, ROW_MULTIPLE, up)


def _rows_times_matrices(kernel, x, ws, group_sizes, finish, outputs, tiles):
  # finish(x @ w for each of `ws`) -> the outputs.
  transpose = kernel == 'transposed'
  (rows, inner), outer = x.shape, ws[0].shape[1 if transpose else 2]
  block_n, block_k = tiles.block_n // len(ws), tiles.block_k
  columns = pl.cdiv(outer, block_n * (1 + tiles.pair))
  expert, used = padding.block_experts(group_sizes, ROW_MULTIPLE, rows // ROW_MULTIPLE)

  def plan(scalars, operands, results):
    (expert, used), (x, *ws) = scalars, operands

    def tile(n, member):
      block, column = plgpu.planar_snake(n, (used[0], columns), 1, tiles.panel)
      across = pl.ds((column * (1 + tiles.pair) + member) * block_n, block_n)
      block_rows, e = pl.ds(block * ROW_MULTIPLE, ROW_MULTIPLE), expert[block]
      part = (e, across) if transpose else (e, slice(None), across)
      return Tile(pl.cdiv(inner, block_k), [x.at[block_rows], *(w.at[part] for w in ws)],
                  [result.at[block_rows, across] for result in results])

    return used[0] * columns, tile

  def multiply(_, step, mine, blocks, sums):
    x, *ws = blocks
    for acc, w in zip(sums, ws, strict=True):
      plgpu.wgmma(acc, x.at[mine], w.transpose((1, 0)) if transpose else w)
    plgpu.wgmma_wait(0)
    return sums

  across = lambda k: (0, k)
  matrix = hopper_pipeline.operand(*(((block_n, block_k), x.dtype, across) if transpose else
                                     ((block_k, block_n), x.dtype, lambda k: (k, 0))))
  return hopper_pipeline.run(
      (x, *ws), (expert, used[None]), [jax.ShapeDtypeStruct((rows, outer), x.dtype)] * outputs, name=kernel,
      specs=[hopper_pipeline.operand((ROW_MULTIPLE, block_k), x.dtype, across, shared=tiles.pair), *[matrix] * len(ws)],
      stages=tiles.stages, pair=tiles.pair, plan=plan,
      total=hopper_pipeline.sums_in_registers(*[block_n] * len(ws)), multiply=multiply, finish=finish)


def _tiles(kernel, x, matrices):
  # Tables count rows before padding.
  experts, inner, outer = matrices
  shape = Shape(x.shape[0] - experts * ROW_MULTIPLE, experts, inner, outer, x.dtype)
  return tuning.choose('pallas_gpu', kernel, shape, candidates(kernel, shape))


def _shared_bytes(block_n, block_k, stages):
  return hopper_pipeline.shared_bytes((ROW_MULTIPLE + block_n) * block_k * 2, stages)
