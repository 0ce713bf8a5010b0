"""Tile sizes of matmuls on a TPU core.

One step of a kernel multiplies a block of rows with a tile of a matrix. Larger tiles mean that rows are read fewer
times, so tiles are as large as the core's vector memory (VMEM) allows. Tiles divide their axis, and are multiples of
the size of the core's matrix unit (MXU) if the axis is.
"""
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128  # of a vector register: the last axis of a tile is a multiple
# Rows per block. With 128, the compiler schedules 1.2 (forward), 1.6 (dX) and 1.9 (dW) times the instructions per row
# on v6e, whose matrix unit is 256 x 256, and 1.1 times on v5e (see experiments/dispatch_benchmark/tpu.json). With 256,
# an expert gets 64 more rows of zeros on average: 6 % more work if experts have 1,024 rows.
ROWS = 256


class Generation(NamedTuple):
  """The properties of a TPU generation that tiles depend on.

  Attributes:
    vmem: bytes of vector memory per core.
    mxu: rows and columns of the matrix unit.
    cores: cores that run one program (a megacore has two); they share the tiles evenly.
  """
  vmem: int
  mxu: int
  cores: int


# Sizes as in `jax.experimental.pallas.tpu.get_tpu_info_for_chip`; names as in `jax.Device.device_kind`.
GENERATIONS = {
    'TPU v4': Generation(vmem=16 * 2**20, mxu=128, cores=2),
    'TPU v5 lite': Generation(vmem=128 * 2**20, mxu=128, cores=1),
    'TPU v5': Generation(vmem=64 * 2**20, mxu=128, cores=2),  # v5p
    'TPU v6 lite': Generation(vmem=128 * 2**20, mxu=256, cores=1),
}
# The rest is for the compiler: register spills, and products before they are accumulated.
SHARE_FOR_BUFFERS = 3 / 4
# The compiler unrolls a product into straight-line code. This many multiply-adds per row (twice as many at the minimum
# number of columns) are a few thousand instructions and compile in seconds; larger products loop over columns.
UNROLLED = {2: 2**21, 4: 2**18}  # by itemsize: a float32 product takes six bfloat16 products


class TPUTiles(NamedTuple):
  """Sizes of one step: rows [ROWS, inner] times a matrix [inner, outer], in chunks of columns.

  Attributes:
    inner: length of the contraction.
    outer: number of columns.
    chunk: columns per chunk; the last may have fewer.
    resident: whether the whole contraction of a matrix stays in VMEM for all rows of an expert, even if `inner` is only
      a part of it.
  """
  inner: int
  outer: int
  chunk: int
  resident: bool = True


def generation(kind: str) -> Generation:
  """The generation of a device kind; interpreted kernels use v5e's. Raises ValueError for an unknown kind."""
  if kind == 'interpreted':
    kind = 'TPU v5 lite'
  if kind not in GENERATIONS:
    raise ValueError(f'{kind} is not one of {", ".join(GENERATIONS)}')
  return GENERATIONS[kind]


def vmem_limit(kind: str) -> int:
  """Bytes of VMEM that a kernel may request."""
  return generation(kind).vmem * 15 // 16


def row_tiles(kind: str, inner: int, outer: int, dtype: jax.typing.DTypeLike, *,
              matrices: int = 1, outputs: int = 1) -> TPUTiles:
  """Tiles for rows [M, inner] times matrices [E, inner, outer].

  A resident tile of a matrix is read once for all rows of an expert, but has fewer columns, so rows are read more
  often; other tiles are read for each block of rows. The choice minimises reads.

  Args:
    kind: device kind.
    inner: length of the contraction.
    outer: columns of a matrix.
    dtype: of rows, matrices and outputs.
    matrices: number of matrices multiplied with the same rows in one pass.
    outputs: number of arrays [M, outer] written.

  Raises:
    ValueError: unknown device kind.
  """
  of, size = generation(kind), jnp.dtype(dtype).itemsize
  possible = [tiles._replace(resident=resident) for tiles in _all_tiles(inner, outer, of.mxu, size, matrices)
              for resident in ((True, False) if tiles.inner < inner else (True,))]
  fitting = [tiles for tiles in possible
             if row_bytes(inner, tiles, size, matrices, outputs) <= of.vmem * SHARE_FOR_BUFFERS]

  def preference(tiles):
    # Short parts of the contraction spend more time on accumulation, and between steps, than on products.
    short = tiles.inner < min(inner, 512)
    read = ROWS * inner * (outer // tiles.outer) + (0 if tiles.resident else matrices * inner * outer)
    return outer // tiles.outer % of.cores > 0, short, read, -tiles.inner

  return min(fitting, key=preference)


def row_bytes(inner: int, tiles: TPUTiles, size: int, matrices: int, outputs: int) -> int:
  """VMEM used with `row_tiles`: everything double-buffered, plus accumulators if the contraction is split."""
  length = inner if tiles.resident else tiles.inner
  sums = 4 * ROWS * tiles.outer * matrices * (tiles.inner < inner)
  return 2 * size * (ROWS * tiles.inner + matrices * length * tiles.outer + outputs * ROWS * tiles.outer) + sums


def row_traffic(rows: int, experts: int, inner: int, outer: int, tiles: TPUTiles, size: int, *,
                matrices: int = 1, outputs: int = 1) -> int:
  """Bytes between HBM and VMEM with `row_tiles`: rows are read once for each tile along `outer`."""
  times_read = experts if tiles.resident else rows // ROWS
  return size * (rows * inner * (outer // tiles.outer) + matrices * times_read * inner * outer + outputs * rows * outer)


def gradient_tiles(kind: str, inner: int, outer: int, dtype: jax.typing.DTypeLike) -> TPUTiles:
  """Tiles of the gradient <float32>[E, inner, outer] of matrices; arguments as in `row_tiles`.

  Rows of x are read once for each tile along `outer`, rows of dy once for each along `inner`.
  """
  of, size = generation(kind), jnp.dtype(dtype).itemsize
  fitting = [tiles for tiles in _all_tiles(inner, outer, of.mxu, size)
             if gradient_bytes(tiles, size) <= of.vmem * SHARE_FOR_BUFFERS]
  shared = lambda tiles: inner // tiles.inner % of.cores == 0 or outer // tiles.outer % of.cores == 0
  return min(fitting, key=lambda tiles: (not shared(tiles), inner * outer / tiles.outer + outer * inner / tiles.inner))


def gradient_bytes(tiles: TPUTiles, size: int) -> int:
  """VMEM used with `gradient_tiles`: double buffers, plus transposed rows of x, in three parts if float32."""
  return 2 * (size * ROWS * (tiles.inner + tiles.outer) + 4 * tiles.inner * tiles.outer) + 3 * size * ROWS * tiles.inner


def gradient_traffic(rows: int, experts: int, inner: int, outer: int, tiles: TPUTiles, size: int) -> int:
  """Bytes between HBM and VMEM with `gradient_tiles`."""
  return (size * rows * (inner * (outer // tiles.outer) + outer * (inner // tiles.inner))
          + 4 * experts * inner * outer)


def _all_tiles(inner: int, outer: int, mxu: int, size: int, matrices: int = 1) -> Iterator[TPUTiles]:
  for part, columns in itertools.product(_divisors(inner, mxu), _divisors(outer, mxu)):
    unit = min(mxu, columns)
    if matrices * part * unit <= 2 * UNROLLED[size]:
      most = max(UNROLLED[size] // (matrices * part), unit)
      yield TPUTiles(part, columns, min(columns, _round_up(-(-columns // -(-columns // most)), unit)))


def _divisors(length: int, mxu: int) -> list[int]:
  unit = mxu if length % mxu == 0 else LANES
  return [length // n for n in range(1, length // unit + 1) if length % (n * unit) == 0]


def _round_up(length: int, unit: int) -> int:
  return -(-length // unit) * unit
