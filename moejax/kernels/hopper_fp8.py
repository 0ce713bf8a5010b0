"""The grouped matmul of `fp8` on Hopper: wgmma on e4m3, with sums scaled and accumulated in float32 every 128 columns.

Tensor cores accumulate 8-bit products with fewer bits than float32, so they sum at most 128 of them (DeepSeek-V3,
arXiv:2412.19437, section 3.3.2). The scales change every 128 columns anyway.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Float8e4m3fn, Int

from moejax.kernels import hopper, hopper_pipeline, padding
from moejax.kernels.choice import Shape
from moejax.kernels.target import Target

ROW_MULTIPLE = hopper_pipeline.ROWS
_BLOCK = 128
_STAGES, _PANEL = 5, 16


def limit(target: Target, shape: Shape) -> str | None:
  """Like `hopper.limit`, but widths must be multiples of 128."""
  if shape.inner % _BLOCK or shape.outer % _BLOCK:
    return f'Kernels for 8-bit floats need widths that are multiples of {_BLOCK}, not {shape.inner} and {shape.outer}.'
  return hopper.limit(target, shape._replace(dtype=jnp.bfloat16))


def matmul(x: Float8e4m3fn[Array, 'M D'], x_scales: Float32[Array, 'M blocks'], w: Float8e4m3fn[Array, 'E F D'],
           w_scales: Float32[Array, 'E blocks_F blocks'], group_sizes: Int[Array, 'E'],
           dtype: jax.typing.DTypeLike) -> Float[Array, 'M F']:
  """Quantised rows times quantised matrices (see `fp8`), in groups of whole blocks of 128 rows.

  Args:
    x: <e4m3>[M,D]
    x_scales: <float32>[M,D/128]
    w: <e4m3>[E,F,D]
    w_scales: <float32>[E,F/128,D/128]
    group_sizes: <int32>[E], positive multiples of 128.
    dtype: of the result.

  Returns:
    <dtype>[M,F]; rows after the last group are undefined.
  """
  (rows, inner), outer = x.shape, w.shape[1]
  columns = outer // _BLOCK
  expert, used = padding.block_experts(group_sizes, ROW_MULTIPLE, rows // ROW_MULTIPLE)

  def plan(scalars, operands, results):
    (expert, used, w_scales), (x, w, x_scales) = scalars, operands
    blocks = used[0]

    def tile(n, _):
      block, column = plgpu.planar_snake(n, (blocks, columns), 1, min(_PANEL, columns))
      at, across, e = pl.ds(block * ROW_MULTIPLE, ROW_MULTIPLE), pl.ds(column * _BLOCK, _BLOCK), expert[block]
      return hopper_pipeline.Tile(
          inner // _BLOCK, [x.at[at], w.at[e, across], x_scales.at[:, at]], [results[0].at[at, across]],
          extra=w_scales.at[e, column])
    return blocks * columns, tile

  def total(sum_products):
    zeros = jnp.zeros((ROW_MULTIPLE // 2, _BLOCK), jnp.float32)
    return sum_products((plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),))

  def multiply(tile, step, mine, blocks, sums):
    x, w, x_scales = blocks

    def product(acc):
      plgpu.wgmma(acc, x.at[mine], w.transpose((1, 0)))
      scales = plgpu.layout_cast(x_scales[0, mine], plgpu.Layout.WGMMA.reduce(1)) * tile.extra[step]
      plgpu.commit_smem()  # the next copy into this buffer must not overtake this read of the scales
      return acc[...], scales

    products, scales = pl.run_scoped(product, hopper_pipeline.mosaic_gpu.ACC((ROW_MULTIPLE // 2, _BLOCK), jnp.float32))
    return (sums[0] + products * jax.lax.broadcast_in_dim(scales, products.shape, (0,)),)

  along_k = hopper_pipeline.operand((_BLOCK, _BLOCK), x.dtype, lambda k: (0, k))
  return hopper_pipeline.run(
      (x, w, x_scales.T), (expert, used[None], w_scales), [jax.ShapeDtypeStruct((rows, outer), dtype)],
      name='matmul_fp8', specs=[along_k, along_k, plgpu.BlockSpec((1, ROW_MULTIPLE), lambda k: (k, 0))],
      stages=_STAGES, pair=False, plan=plan, total=total, multiply=multiply, finish=lambda y: [y])[0]
