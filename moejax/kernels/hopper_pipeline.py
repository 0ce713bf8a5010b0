"""Common parts of the Hopper matmuls: a persistent grid of one block per multiprocessor that loops over output tiles.

A block has three warpgroups. The last only starts copies of operands into shared memory (TMA), some steps ahead, and
gives its registers to the other two, which multiply 64 rows of the tile each (wgmma) and keep the sums in registers. A
finished tile is stored through two small buffers per warpgroup, one filled while the other is copied out, which leaves
most of the shared memory to operands; meanwhile the first operands of the next tile are loaded.

Blocks may work in pairs (a cluster) on two tiles with a common operand: each loads half of it for both.
"""
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Shaped

from moejax.kernels.target import target

mosaic_gpu: Any = plgpu  # has names that type checkers do not see: ACC, and what interprets
ROWS = 128  # rows of a tile, 64 for each of two warpgroups; also the rows of a block of one expert
SHARED_BYTES = 227 * 1024  # maximum per block
SWIZZLE = 128  # bytes per row of a buffer; this swizzle avoids bank conflicts of wgmma and TMA
_RESERVED_BYTES = 1024  # of shared memory, for barriers
_WARPGROUPS, _WARPGROUP_ROWS, _SLOTS = 2, 64, 2
_PROCESSORS = 132  # of an H100 SXM, if the device does not report it
_PRODUCER_REGISTERS = 40  # per thread; of the 65536 of a multiprocessor, this leaves 232 for the others


class Tile(NamedTuple):
  """A block's unit of work: `steps` products of blocks of `operands`, summed into `results` [128, columns]."""
  steps: int | jax.Array
  operands: Sequence[Any]
  results: Sequence[Any]
  extra: Any = None  # for `multiply`


def shared_bytes(operand_bytes: int, stages: int) -> int:
  """Shared memory of a block with `stages` steps of `operand_bytes` each."""
  return stages * operand_bytes + _WARPGROUPS * _SLOTS * _WARPGROUP_ROWS * SWIZZLE + _RESERVED_BYTES


def operand(shape: tuple[int, int], dtype: Any, index_map: Callable, shared: bool = False) -> plgpu.BlockSpec:
  """The BlockSpec of one step of an operand of the tile; `shared` if both blocks of a pair use the same."""
  return plgpu.BlockSpec(shape, index_map, transforms=_swizzled(dtype), collective_axes=('pair',) if shared else ())


def sums_in_registers(*columns: int) -> Callable:
  """The usual `total` of `run`: one wgmma accumulator of 64 rows per warpgroup for each entry of `columns`."""
  def total(sum_products):
    def scoped(*sums):
      sum_products(sums)
      return tuple(acc[...] for acc in sums)
    return pl.run_scoped(scoped, *(mosaic_gpu.ACC((_WARPGROUP_ROWS, n), jnp.float32) for n in columns))
  return total


def run(operands: Sequence[Shaped[Array, '...']], scalars: Sequence[Shaped[Array, '...']],
        outputs: Sequence[jax.ShapeDtypeStruct], *, name: str, specs: Sequence[plgpu.BlockSpec], stages: int,
        pair: bool, plan: Callable, total: Callable, multiply: Callable,
        finish: Callable) -> list[Shaped[Array, '...']]:
  """Runs a kernel.

  Args:
    operands: arrays to multiply, one for each of `specs`.
    scalars: small arrays that `plan` reads.
    outputs: shapes of the results, all of the same dtype.
    name: of the kernel, in profiles.
    specs: see `operand`.
    stages: steps whose operands are in shared memory at once.
    pair: whether blocks work in pairs.
    plan: `(scalars, operands, outputs) -> (tiles, tile)` on references, where `tile(n, member)` is Tile `n` of `tiles`;
      if blocks work in pairs, the Tile of the pair's `member` 0 or 1.
    total: `(sum_products) -> <float32>[64, columns]s`, where `sum_products(sums)` runs all steps and returns the sums.
    multiply: `(tile, step, mine, blocks, sums) -> sums` adds one step's products for the warpgroup's 64 rows, `mine`.
    finish: `(*totals) -> results`, elementwise.
  """
  def body(*refs):
    ends = len(scalars), len(scalars) + len(operands)
    inputs = refs[ends[0]:ends[1]]
    tiles, tile_at = plan(refs[:ends[0]], inputs, refs[ends[1]:])

    def pipeline(steps, step, context):
      return plgpu.emit_pipeline_warp_specialized(
          step, grid=(steps,), in_specs=specs, max_concurrent_steps=stages, compute_context=context,
          memory_registers=_PRODUCER_REGISTERS, num_compute_wgs=_WARPGROUPS, wg_axis='warpgroup')

    # Any tile determines the buffers of the pipeline.
    some = tile_at(jnp.int32(0), jnp.int32(0))

    @functools.partial(
        pl.run_scoped, buffers=pipeline(some.steps, None, _nothing).get_allocations(*inputs),
        leaving=_leaving(outputs[0].dtype), collective_axes='warpgroup')
    def _(buffers, leaving):
      warpgroup = lax.axis_index('warpgroup')
      mine = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)

      @plgpu.nd_loop((tiles,), collective_axes='processor')
      def _(loop):
        tile = tile_at(_fair(loop, tiles), lax.axis_index('pair'))

        def compute(sum_products):
          _store(total(sum_products), finish, leaving.at[warpgroup], [result.at[mine] for result in tile.results])

        def step(index, *blocks_and_sums):
          *blocks, sums = blocks_and_sums
          return multiply(tile, index[0], mine, blocks, sums)

        pipeline(tile.steps, step, compute)(*tile.operands, allocations=buffers)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  body.__name__ = name
  blocks = 2 if pair else 1
  kernel = plgpu.kernel(
      body, out_type=list(outputs), grid=(_processors() // blocks,), grid_names=('processor',), cluster=(blocks,),
      cluster_names=('pair',), num_threads=_WARPGROUPS + 1, thread_name='warpgroup',
      compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
  with _interpreted():
    return kernel(*scalars, *operands)


def _fair(loop, tiles):
  # Every second round is reversed, so that blocks get equal work if large tiles come before small ones.
  blocks = lax.axis_size('processor')
  first = loop.local_index * blocks
  reverse = (lax.rem(loop.local_index, 2) == 1) & (first + blocks <= tiles)
  return lax.select(reverse, 2 * first + blocks - 1 - loop.index[0], loop.index[0])


def _store(totals, finish, leaving, results):
  # 128 bytes of each row at a time, alternating slots: one is free once all copies but the newest have read.
  columns = SWIZZLE // jnp.dtype(leaving.dtype).itemsize
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  slot = 0
  for start in range(0, totals[0].shape[1], columns):
    values = finish(*(total[:, start:start + columns] for total in totals))
    for value, result in zip(values, results, strict=True):
      plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
      leaving[slot] = value.astype(leaving.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(leaving.at[slot], result.at[:, pl.ds(start, columns)])
      slot = (slot + 1) % _SLOTS


def _leaving(dtype):
  columns = SWIZZLE // jnp.dtype(dtype).itemsize
  return plgpu.SMEM((_WARPGROUPS, _SLOTS, _WARPGROUP_ROWS, columns), dtype, transforms=_swizzled(dtype))


def _swizzled(dtype):
  return plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def _processors():
  # An interpreted grid runs blocks one after another: four (or two pairs) suffice to test how blocks share tiles.
  if target().interpret:
    return 4
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return getattr(device, 'num_cores', None) or getattr(device, 'core_count', _PROCESSORS)


def _interpreted():
  if not target().interpret:
    return contextlib.nullcontext()
  return mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True))


def _nothing(*_):
  return None
