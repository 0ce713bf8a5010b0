"""8-bit floats with scales approximate their inputs within the error of e4m3, and refuse unsupported inputs.

e4m3 has 3 bits after the first, so a number is off by at most 2^-4 of itself; below 2^-6 it is a multiple of 2^-9, and
off by at most 2^-10, times the scale. The bound on a product follows from the triangle inequality, in float64.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels import fp8

M, E, D, F = 40, 3, 256, 128
SIZES = jnp.array([17, 0, 13])


def draw():
  """Rows and matrices whose blocks differ in size by orders of magnitude; rows after the last group are NaN."""
  rng = np.random.RandomState(0)
  x = rng.randn(M, D) * np.repeat(10.**rng.randint(-6, 6, (M, D // 128)), 128, axis=1)
  x[sum(SIZES):] = np.nan
  return jnp.asarray(x, jnp.float32), jnp.asarray(rng.randn(E, D, F) * rng.lognormal(size=(E, D, F)), jnp.float32)


def errors(a, scales):
  return np.maximum(np.abs(a) / 16, scales / 1024)


def test_rows_and_matrices_are_what_they_stand_for_within_the_error_of_e4m3():
  x, w = draw()
  x = x[:sum(SIZES)]
  values, scales = fp8.quantize_rows(x)
  assert values.dtype == jnp.float8_e4m3fn and values.shape == x.shape and scales.shape == (sum(SIZES), D // 128)
  assert (np.abs(fp8.dequantized_rows(values, scales) - x) <= errors(x, np.repeat(scales, 128, 1)) * (1 + 2**-20)).all()
  values, scales = fp8.quantize_matrices(w)
  assert values.shape == (E, F, D) and scales.shape == (E, F // 128, D // 128)
  of_each = np.repeat(np.repeat(scales, 128, 1), 128, 2).swapaxes(1, 2)
  assert (np.abs(fp8.dequantized_matrices(values, scales) - w) <= errors(w, of_each) * (1 + 2**-20)).all()


def test_the_largest_of_a_block_is_448_and_zeros_stay_zeros():
  x = jnp.zeros((2, 256)).at[0, 3].set(-7.).at[0, 5].set(3.5)
  values, scales = fp8.quantize_rows(x)
  assert values[0, 3] == -448 and values[0, 5] == 224 and scales[0, 0] == np.float32(7) / np.float32(448)
  np.testing.assert_array_equal(fp8.dequantized_rows(values, scales)[:, 128:], 0)
  np.testing.assert_array_equal(fp8.dequantized_rows(values, scales)[1], 0)


def test_a_product_is_within_the_bound_of_the_unquantised_one_and_zero_after_the_last_group():
  x, w = draw()
  y = fp8.grouped_matmul_fp8(x, w, SIZES, implementation='reference')
  x_error = errors(x, np.repeat(fp8.quantize_rows(x)[1], 128, axis=1)).astype(np.float64)
  scales = fp8.quantize_matrices(w)[1]
  w_error = errors(w, np.repeat(np.repeat(scales, 128, 1), 128, 2).swapaxes(1, 2)).astype(np.float64)
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  for row, e in enumerate(np.repeat(np.arange(E), SIZES)):
    bound = np.abs(x[row]) @ w_error[e] + x_error[row] @ (np.abs(w[e]) + w_error[e])
    assert (np.abs(y[row] - x[row] @ w[e]) <= bound * (1 + 2**-12)).all()
    # It is no empty promise: numbers, not zeros, come out.
    assert (bound < np.abs(x[row]) @ np.abs(w[e]) / 5).all()
  assert not y[sum(SIZES):].any()


@pytest.mark.parametrize('implementation, message', [
    ('pallas_gpu', "NVIDIA GPUs, not for 'cpu'.*'reference'"), ('cutlass', 'Allowed: reference, pallas_gpu')])
def test_an_implementation_that_cannot_run_is_refused(implementation, message):
  with pytest.raises(ValueError, match=message):
    fp8.grouped_matmul_fp8(*draw(), SIZES, implementation=implementation)


def test_widths_with_parts_of_a_block_are_refused():
  with pytest.raises(ValueError, match='multiples of 128'):
    fp8.quantize_rows(jnp.zeros((2, 200)))
  with pytest.raises(ValueError, match='multiples of 128'):
    fp8.quantize_matrices(jnp.zeros((1, 128, 64)))


def test_differentiation_is_refused():
  x, w = draw()
  for argument in 0, 1:
    with pytest.raises(TypeError, match='no gradient: train with grouped_matmul'):
      jax.grad(lambda x, w: fp8.grouped_matmul_fp8(x, w, SIZES, implementation='reference').sum(), argument)(x, w)
