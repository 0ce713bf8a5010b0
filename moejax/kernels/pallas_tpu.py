"""Grouped matmul for TPU: Pallas kernels on blocks of rows of one expert (see `padding`).

A tile of a matrix stays in VMEM for all blocks of its expert, and the next expert's tile is prefetched from the first
block on, so its copy overlaps with all rows of an expert instead of one block. A tile of a gradient stays in VMEM while
blocks are added to it. Unused blocks are not in the grid.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from moejax.kernels import padding, tpu_tiles
from moejax.kernels.choice import Implementation, Shape
from moejax.kernels.expert_block import Activation, activate
from moejax.kernels.target import Target, target
from moejax.kernels.tpu_tiles import ROWS


def matmul(x: Float[Array, 'M inner'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'],
           transpose: bool = False) -> Float[Array, 'M outer']:
  """x: <float>[M,D], w: <float>[E,D,F] -> <float>[M,F]; transposed, x: <float>[M,F] -> <float>[M,D]."""
  return _rows_times_matrices(x, (w,), group_sizes, transpose, lambda y: (y,), 1)[0]


def up(x: Float[Array, 'M D'], wi: Float[Array, 'E D F'], wg: Float[Array, 'E D F'] | None,
       group_sizes: Int[Array, 'E'],
       activation: Activation) -> tuple[Float[Array, 'M F'], Float[Array, 'M F'], Float[Array, 'M F'] | None]:
  """x: <float>[M,D], wi and wg: <float>[E,D,F] -> hidden, zi and zg: <float>[M,F]; zg is None if wg is."""
  if wg is None:
    plain = lambda zi: (activate(activation, zi, None), zi)
    return (*_rows_times_matrices(x, (wi,), group_sizes, False, plain, 2), None)
  gated = lambda zi, zg: (activate(activation, zi, zg), zi, zg)
  return _rows_times_matrices(x, (wi, wg), group_sizes, False, gated, 3)


def weight_gradient(x: Float[Array, 'M D'], dy: Float[Array, 'M F'],
                    group_sizes: Int[Array, 'E']) -> Float32[Array, 'E D F']:
  """x: <float>[M,D], dy: <float>[M,F] -> <float32>[E,D,F]."""
  (rows, inner), outer, experts, now = x.shape, dy.shape[1], group_sizes.shape[0], target()
  tiles = tpu_tiles.gradient_tiles(now.kind, inner, outer, x.dtype)
  expert_of_block, used = padding.block_experts(group_sizes, ROWS, rows // ROWS)
  return pl.pallas_call(
      functools.partial(_gradient_kernel, chunk=tiles.chunk),
      out_shape=jax.ShapeDtypeStruct((experts, inner, outer), jnp.float32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(inner // tiles.inner, outer // tiles.outer, used),
          in_specs=[pl.BlockSpec((ROWS, tiles.inner), lambda i, o, block, _: (block, i)),
                    pl.BlockSpec((ROWS, tiles.outer), lambda i, o, block, _: (block, o))],
          out_specs=pl.BlockSpec((None, tiles.inner, tiles.outer), lambda i, o, block, expert: (expert[block], i, o))),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=tpu_tiles.vmem_limit(now.kind)),
      cost_estimate=pl.CostEstimate(
          flops=2 * rows * inner * outer, transcendentals=0,
          bytes_accessed=tpu_tiles.gradient_traffic(rows, experts, inner, outer, tiles, x.dtype.itemsize)),
      interpret=now.interpret, name='weight_gradient',
  )(expert_of_block, x, dy)


def _gradient_kernel(expert, x, dy, dw, *, chunk):
  # A tile of dw stays in VMEM while the blocks of its expert are added to it.
  is_first = _is_first(expert, pl.program_id(2))

  def add(columns):
    product = _dot(x[...], dy[:, columns], (0, 0))
    dw[:, columns] = jnp.where(is_first, product, dw[:, columns] + product)

  _for_chunks(add, dw.shape[1], chunk)


def _rows_times_matrices(x, matrices, group_sizes, transpose, finish, outputs):
  # x [M,inner] times each of `matrices`; `finish` maps the products to the `outputs` arrays [M,outer] to write.
  rows, now = x.shape[0], target()
  experts, *sides = matrices[0].shape
  inner, outer = reversed(sides) if transpose else sides
  tiles = tpu_tiles.row_tiles(now.kind, inner, outer, x.dtype, matrices=len(matrices), outputs=outputs)
  expert_of_block, used = padding.block_experts(group_sizes, ROWS, rows // ROWS)
  all_columns, steps = outer // tiles.outer, inner // tiles.inner
  # Cores share the tiles; each loads its own first tile.
  cores = tpu_tiles.generation(now.kind).cores
  cores = cores if all_columns % cores == 0 else 1
  columns = all_columns // cores
  turn = (lambda along, column: (column, along)) if transpose else (lambda along, column: (along, column))
  row_spec = pl.BlockSpec((ROWS, tiles.inner), lambda core, column, block, step, _: (block, step))
  matrix_spec = pl.BlockSpec(memory_space=pl.ANY) if tiles.resident else pl.BlockSpec(
      (None, *turn(tiles.inner, tiles.outer)),
      lambda core, column, block, step, expert: (expert[block], *turn(step, core * columns + column)))
  result_spec = pl.BlockSpec((ROWS, tiles.outer), lambda core, column, block, step, _: (block, core * columns + column))
  many = len(matrices)
  return pl.pallas_call(
      functools.partial(_rows_kernel, transpose=transpose, finish=finish, tiles=tiles),
      out_shape=((jax.ShapeDtypeStruct((rows, outer), x.dtype),) * outputs,),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(cores, columns, used, steps),
          in_specs=[row_spec, (matrix_spec,) * many], out_specs=((result_spec,) * outputs,),
          scratch_shapes=[
              (pltpu.VMEM((2, *turn(inner, tiles.outer)), x.dtype),) * (many if tiles.resident else 0),
              pltpu.SemaphoreType.DMA((2, many)),
              (pltpu.VMEM((ROWS, tiles.outer), jnp.float32),) * (many if steps > 1 else 0)]),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary', 'arbitrary', 'arbitrary'),
          vmem_limit_bytes=tpu_tiles.vmem_limit(now.kind)),
      cost_estimate=pl.CostEstimate(
          flops=2 * rows * inner * outer * many, transcendentals=0,
          bytes_accessed=tpu_tiles.row_traffic(rows, experts, inner, outer, tiles, x.dtype.itemsize,
                                               matrices=many, outputs=outputs)),
      interpret=now.interpret, name='grouped_matmul',
  )(expert_of_block, x, matrices)[0]


def _rows_kernel(expert, x, matrices, results, buffers, arrived, sums, *, transpose, finish, tiles):
  step, steps = pl.program_id(3), pl.num_programs(3)
  parts = matrices
  if tiles.resident:
    at = pl.ds(pl.multiple_of(step * tiles.inner, tiles.inner), tiles.inner)
    parts = [tile.at[:, at] if transpose else tile.at[at]
             for tile in _resident(expert, matrices, buffers, arrived, transpose)]

  def write(at, totals):
    for result, value in zip(results, finish(*totals), strict=True):
      result[:, at] = value.astype(result.dtype)

  def chunk(at):
    products = [_dot(x[...], part[at] if transpose else part[:, at], (1, 1 if transpose else 0)) for part in parts]
    if not sums:
      write(at, products)
      return
    for total, value in zip(sums, products):
      total[:, at] = jnp.where(step == 0, value, total[:, at] + value)

    @pl.when(step == steps - 1)
    def _():
      write(at, [total[:, at] for total in sums])

  _for_chunks(chunk, tiles.outer, tiles.chunk)


def _resident(expert, matrices, buffers, arrived, transpose):
  # This expert's tiles, after waiting for their copies; also starts copying the next tiles.
  core, column, block, step = (pl.program_id(axis) for axis in range(4))
  columns, experts, mine = pl.num_programs(1), matrices[0].shape[0], expert[block]
  width = buffers[0].shape[1 if transpose else 2]

  def place(column, e):
    return (column * experts + e) % 2  # tiles come in this order and alternate buffers

  def copies(column, e):
    at, to = pl.ds(pl.multiple_of((core * columns + column) * width, width), width), place(column, e)
    return [pltpu.make_async_copy(w.at[e, at] if transpose else w.at[e, :, at], buffer.at[to], arrived.at[to, n])
            for n, (w, buffer) in enumerate(zip(matrices, buffers))]

  @pl.when((step == 0) & _is_first(expert, block))
  def _():
    @pl.when((column == 0) & (block == 0))
    def _():
      for copy in copies(column, mine):
        copy.start()
    for copy in copies(column, mine):
      copy.wait()

    # Every expert has a block, so the next tile is the next expert's, or the first one's in the next column.
    last = mine == experts - 1

    @pl.when(~last | (column < columns - 1))
    def _():
      for copy in copies(column + last, jnp.where(last, 0, mine + 1)):
        copy.start()

  return [buffer.at[place(column, mine)] for buffer in buffers]


def _for_chunks(body, columns, chunk):
  def run(n, _):
    body(pl.ds(pl.multiple_of(n * chunk, chunk), chunk))
  jax.lax.fori_loop(0, columns // chunk, run, None)
  if rest := columns % chunk:
    body(pl.ds(columns - rest, rest))


def _is_first(expert, block):
  return (block == 0) | (expert[jnp.maximum(block - 1, 0)] != expert[block])


def _dot(a, b, contract):
  # bfloat16 products are exact in float32 either way; float32 inputs would be rounded to bfloat16.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def limit(to: Target, shape: Shape) -> str | None:
  """One sentence on why `to` cannot run `shape`, and what can; None if it can."""
  if to.platform != 'tpu':
    return f"'pallas_tpu' runs on TPU, not on {to.platform}: use '{'xla' if to.platform == 'cpu' else 'ragged_dot'}'."
  if jnp.dtype(shape.dtype) not in (jnp.bfloat16, jnp.float32):
    return f"'pallas_tpu' multiplies bfloat16 and float32, not {jnp.dtype(shape.dtype).name}: use 'ragged_dot'."
  if shape.inner % tpu_tiles.LANES or shape.outer % tpu_tiles.LANES:
    return (f"'pallas_tpu' needs widths that are multiples of {tpu_tiles.LANES}, not {shape.inner} and {shape.outer}: "
            "use 'ragged_dot'.")
  try:
    tpu_tiles.generation(to.kind)
  except ValueError as error:
    return f"'pallas_tpu' has no tiles for this chip, {error}: use 'ragged_dot'."
  return None


IMPLEMENTATION = Implementation(matmul, weight_gradient, limit, ROWS, up)
