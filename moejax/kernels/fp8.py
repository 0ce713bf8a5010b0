"""Grouped matmul of 8-bit floats with block scales: forward only, at twice the peak rate of bfloat16.

As in DeepSeek-V3 (arXiv:2412.19437, section 3.3) and DeepGEMM: e4m3 on both sides, one scale per 128 columns of a row
of activations and per 128 x 128 block of a matrix, sums in float32.
"""
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Float8e4m3fn, Int

from moejax.kernels import hopper_fp8, padding, reference
from moejax.kernels.choice import Shape
from moejax.kernels.target import target

Name = Literal['reference', 'pallas_gpu']
BLOCK = 128
_LARGEST = 448.  # the largest e4m3 value


def quantize_rows(x: Float[Array, 'M D']) -> tuple[Float8e4m3fn[Array, 'M D'], Float32[Array, 'M blocks']]:
  """x: <float>[M,D] -> values <e4m3>[M,D] and scales <float32>[M,D/128], with x ~ values * scales.

  Raises:
    ValueError: D is not a multiple of 128.
  """
  _check('rows', x.shape[-1:])
  blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
  values, scales = _quantize(blocks, axis=2)
  return values.reshape(x.shape), scales[:, :, 0]


def quantize_matrices(
    w: Float[Array, 'E D F']) -> tuple[Float8e4m3fn[Array, 'E F D'], Float32[Array, 'E blocks_F blocks_D']]:
  """w: <float>[E,D,F] -> values <e4m3>[E,F,D] and scales <float32>[E,F/128,D/128].

  Transposed, because tensor cores require both 8-bit operands to be contiguous in the contracted dimension.

  Raises:
    ValueError: D or F is not a multiple of 128.
  """
  _check('matrices', w.shape[1:])
  e, d, f = w.shape
  blocks = w.astype(jnp.float32).swapaxes(1, 2).reshape(e, f // BLOCK, BLOCK, d // BLOCK, BLOCK)
  values, scales = _quantize(blocks, axis=(2, 4))
  return values.reshape(e, f, d), scales[:, :, 0, :, 0]


def dequantized_rows(values: Float8e4m3fn[Array, 'M D'], scales: Float32[Array, 'M blocks']) -> Float32[Array, 'M D']:
  """The inverse of `quantize_rows`: <float32>[M,D]."""
  return values.astype(jnp.float32) * jnp.repeat(scales, BLOCK, axis=1)


def dequantized_matrices(values: Float8e4m3fn[Array, 'E F D'],
                         scales: Float32[Array, 'E blocks_F blocks_D']) -> Float32[Array, 'E D F']:
  """The inverse of `quantize_matrices`: <float32>[E,D,F]."""
  scales = jnp.repeat(jnp.repeat(scales, BLOCK, axis=1), BLOCK, axis=2)
  return (values.astype(jnp.float32) * scales).swapaxes(1, 2)


def grouped_matmul_fp8(x: Float[Array, 'M D'], w: Float[Array, 'E D F'], group_sizes: Int[Array, 'E'], *,
                       implementation: Name | None = None) -> Float[Array, 'M F']:
  """`grouped_matmul` with both sides quantised to e4m3. For inference: it has no gradient.

  The error of each number is at most 1/16 of itself, or 2^-10 of its scale, which is the block's largest number / 448.

  Args:
    x: <float>[M,D].
    w: <float>[E,D,F].
    group_sizes: <int32>[E], together at most M.
    implementation: 'reference' (dequantised, every row times every matrix), 'pallas_gpu' (Hopper); None: by target.

  Returns:
    <float>[M,F] of the dtype of `x`; zeros after the last group.

  Raises:
    ValueError: the implementation is unknown or cannot run on the target, or widths are not multiples of 128.
    TypeError: it is differentiated.
  """
  on_hopper = hopper_fp8.limit(target(), Shape(x.shape[0], w.shape[0], w.shape[1], w.shape[2], x.dtype))
  name = implementation or ('reference' if on_hopper else 'pallas_gpu')
  if name not in get_args(Name):
    raise ValueError(f'grouped_matmul_fp8 has no implementation {name!r}. Allowed: {", ".join(get_args(Name))}.')
  if name == 'pallas_gpu' and on_hopper:
    raise ValueError(f"{on_hopper} Elsewhere only 'reference' multiplies 8-bit floats.")
  return _forward_only(name, x, w, group_sizes.astype(jnp.int32))


@jax.custom_jvp
def _no_gradient(x):
  return x


@_no_gradient.defjvp
def _(primals, tangents):
  raise TypeError('grouped_matmul_fp8 has no gradient: train with grouped_matmul, or use stop_gradient on its inputs.')


def _forward_only(name, x, w, group_sizes):
  return _IMPLEMENTATIONS[name](*quantize_rows(_no_gradient(x)), *quantize_matrices(_no_gradient(w)), group_sizes,
                                x.dtype)


def _reference(x, x_scales, w, w_scales, group_sizes, dtype):
  product = reference.matmul(dequantized_rows(x, x_scales), dequantized_matrices(w, w_scales), group_sizes)
  return product.astype(dtype)


def _pallas_gpu(x, x_scales, w, w_scales, group_sizes, dtype):
  sizes, source, place = padding.pad_groups(group_sizes, x.shape[0], hopper_fp8.ROW_MULTIPLE)
  padded = lambda a: a.at[source].get(mode='fill', fill_value=0)
  y = hopper_fp8.matmul(padded(x), padded(x_scales), w, w_scales, sizes, dtype)
  return y.at[place].get(mode='fill', fill_value=0)


_IMPLEMENTATIONS = {'reference': _reference, 'pallas_gpu': _pallas_gpu}


def _quantize(blocks, axis):
  # A block of zeros gets the smallest positive scale, because 0 / 0 is NaN.
  largest = jnp.max(jnp.abs(blocks), axis, keepdims=True)
  scales = jnp.maximum(largest / _LARGEST, jnp.finfo(jnp.float32).tiny)
  return (blocks / scales).astype(jnp.float8_e4m3fn), scales


def _check(what, widths):
  if any(width % BLOCK for width in widths):
    raise ValueError(f'To quantise {what}, their widths must be multiples of {BLOCK}, not {tuple(widths)}.')
