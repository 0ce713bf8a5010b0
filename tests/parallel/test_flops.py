"""FLOPs of traced programs, against products of their sizes by hand."""
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from moejax import kernels
from moejax.kernels.target import interpreted
from moejax.parallel.flops import flops

A, B, C = 6, 5, 4
x, w = jax.ShapeDtypeStruct((A, B), jnp.float32), jax.ShapeDtypeStruct((B, C), jnp.float32)
ONE = 2 * A * B * C


def of(function, *arguments, **options):
  return flops(jax.make_jaxpr(function)(*arguments).jaxpr, **options)


def repeated(times, x, w):
  return jax.lax.scan(lambda x, _: ((x @ w) @ w.T, None), x, length=times)[0]


@pytest.mark.parametrize('function, expected', [
    (lambda x, w: x @ w, ONE),
    (lambda x, w: jax.jit(lambda x: x + 1)(x) @ w, ONE),
    (functools.partial(repeated, 7), 7 * 2 * ONE),
    (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ (w.T @ w)),
     ONE + 2 * C * B * C + 2 * A * C * C),
    (lambda x, w: jax.vmap(lambda x: x @ w)(jnp.stack([x] * 3)), 3 * ONE),
    # One product forward, two backward; recomputed, one more.
    (jax.grad(lambda x, w: jnp.sin(x @ w).sum(), argnums=(0, 1)), 3 * ONE),
    (jax.grad(jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w)).sum()), argnums=(0, 1)), 4 * ONE),
])
def test_products_count_as_often_as_they_run(function, expected):
  assert of(function, x, w) == expected


def test_products_inside_of_a_shard_map_count_for_every_device():
  mesh = Mesh(jax.devices(), ('x',), axis_types=(AxisType.Auto,))
  rows = jax.ShapeDtypeStruct((8 * A, B), jnp.float32)
  spec = PartitionSpec('x')
  shared = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
  assert of(shared, rows, w) == 8 * ONE == of(lambda x, w: x @ w, rows, w)


def test_a_convolution_multiplies_every_output_with_its_window():
  image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((4, 4, 3, 5), jnp.float32)
  patches = lambda image, kernel: jax.lax.conv_general_dilated(
      image, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  assert of(patches, image, kernel) == 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)


def test_every_row_of_a_grouped_product_counts_one_matrix():
  rows, matrices = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((4, 16, 8), jnp.float32)
  sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

  def product(rows, matrices, sizes):
    return kernels.grouped_matmul(rows, matrices, sizes, implementation='ragged_dot').sum()

  assert of(product, rows, matrices, sizes) == 2 * 64 * 16 * 8
  assert of(jax.grad(product, argnums=(0, 1)), rows, matrices, sizes) == 3 * 2 * 64 * 16 * 8


@pytest.mark.parametrize('platform, implementation', [('tpu', 'pallas_tpu'), ('gpu', 'pallas_gpu')])
def test_kernels_count_the_rows_that_they_multiply(platform, implementation):
  """The TPU's says what it does, the GPU's nothing; both fill the last block of every expert, of up to 256 rows."""
  rows, matrices = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16)
  with interpreted(platform):
    found = of(lambda x, w, n: kernels.grouped_matmul(x, w, n, implementation=implementation), rows, matrices,
               jax.ShapeDtypeStruct((4,), jnp.int32))
  assert 512 * 2 * 128 * 256 <= found <= (512 + 4 * 256) * 2 * 128 * 256


def test_products_can_be_told_apart_by_name_scope():
  def function(x, w):
    with jax.named_scope('inner'):
      y = jax.checkpoint(lambda x: x @ w)(x)
    return y @ w.T

  assert of(function, x, w) == 2 * ONE
  assert of(function, x, w, of=lambda scope: 'inner' in scope) == ONE
