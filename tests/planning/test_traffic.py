"""Memory traffic of compiled programs, against the minimum they must read and write."""
import jax
import jax.numpy as jnp
import pytest

from moejax.planning.traffic import in_memory, traffic

MIB = 2**20
LAYERS = jax.ShapeDtypeStruct((5, 1024, 1024), jnp.float32)  # 20 MiB
ONE = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)  # 4 MiB


def of(function, *arguments, **options):
  return traffic(jax.jit(function, **options).lower(*arguments).compile().as_text()) / MIB


def test_a_fusion_reads_its_operands_and_writes_its_result_once():
  assert of(lambda x: jnp.sin(x) * 2 + 1, ONE) == pytest.approx(8, rel=0.01)


def test_a_product_reads_both_matrices_and_writes_one():
  assert of(lambda x, y: x @ y, ONE, ONE) == pytest.approx(12, rel=0.01)


def test_a_loop_over_a_stack_reads_one_slice_an_iteration():
  """x <- x * w_i for 5 slices w_i: each reads x and a slice and writes x; and x may be copied once before."""
  found = of(lambda x, w: jax.lax.scan(lambda x, w: (x * w, None), x, w)[0], ONE, LAYERS)
  assert 5 * 12 <= found <= 5 * 12 + 8 + 1


def test_a_slice_that_is_written_in_place_does_not_count_the_array_around_it():
  update = lambda w, x: jax.lax.dynamic_update_index_in_dim(w, jnp.sin(x), 2, 0)
  assert of(update, LAYERS, ONE, donate_argnums=0) <= 4 * 4 + 1


@pytest.mark.parametrize('shape, size', [
    ('f32[4,256]{1,0:T(8,128)}', 4096), ('bf16[4,256]{1,0:T(8,128)(2,1)S(1)}', 0), ('s32[]{:T(128)S(6)}', 0),
    ('(f32[8]{0:T(128)}, f32[8]{0:T(128)S(1)}, pred[3]{0:T(512)})', 35)])
def test_arrays_that_stay_on_the_chip_are_not_traffic(shape, size):
  assert in_memory(shape) == size
