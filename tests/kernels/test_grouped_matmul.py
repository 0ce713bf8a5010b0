"""Every implementation of `grouped_matmul` equals a float64 loop over rows: values, gradients, and what must be zero.

The oracle is the loop below. Rows after the last group hold NaN in every comparison, in `x` and in the cotangent.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from moejax.kernels import xla
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, default_implementation, grouped_matmul

# 300 rows in 5 groups make blocks of 64 and 16 rows: several blocks a group, partial blocks, blocks at the end.
M, D, F, E = 300, 4, 6, 5


def loop(x, w, group_sizes, dy):
  """y, dx and dw in float64, one row at a time."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
  expert_of_row = np.repeat(np.arange(len(group_sizes)), group_sizes)
  for row, e in enumerate(expert_of_row):
    y[row] = x[row] @ w[e]
    dx[row] = w[e] @ dy[row]
    dw[e] += np.outer(x[row], dy[row])
  return y, dx, dw


def draw(dtype, seed=0):
  rng = np.random.RandomState(seed)
  return (jnp.asarray(rng.randn(M, D), dtype), jnp.asarray(rng.randn(E, D, F), dtype),
          jnp.asarray(rng.randn(M, F), dtype))


def poison(a, group_sizes):
  return jnp.where((jnp.arange(len(a)) < sum(group_sizes))[:, None], a, jnp.nan)


def value_and_gradients(name):
  @jax.jit
  def run(x, w, group_sizes, dy):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=name), x, w)
    return y, *pull(dy)
  return run


RUN = {name: value_and_gradients(name) for name in IMPLEMENTATIONS}


@st.composite
def sizes(draw):
  """E group sizes with a sum of at most M; empty groups are likely."""
  cuts = sorted(draw(st.lists(st.integers(0, M) | st.just(0), min_size=E, max_size=E)))
  return draw(st.permutations([b - a for a, b in zip([0] + cuts, cuts)]))


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@given(group_sizes=sizes())
@example(group_sizes=[0, 0, M, 0, 0])
@example(group_sizes=[0, 0, 0, 0, 0])
@example(group_sizes=[64, 128, 16, 80, 12])
@example(group_sizes=[1, 0, 63, 65, 17])
def test_equals_the_loop_over_rows_for_any_group_sizes(name, group_sizes):
  x, w, dy = draw(jnp.float32)
  got = RUN[name](poison(x, group_sizes), w, jnp.array(group_sizes, jnp.int32), poison(dy, group_sizes))
  for a, b in zip(got, loop(x, w, group_sizes, dy)):
    # At most 300 float32 additions of products below 16.
    np.testing.assert_allclose(a, b, rtol=0, atol=300 * 2**-24 * 16)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_rows_after_the_last_group_and_matrices_of_empty_groups_get_exact_zeros(name):
  group_sizes = [100, 0, 70, 0, 30]
  x, w, dy = draw(jnp.float32)
  y, dx, dw = RUN[name](poison(x, group_sizes), w, jnp.array(group_sizes, jnp.int32), poison(dy, group_sizes))
  assert not y[200:].any() and not dx[200:].any()
  assert not dw[1].any() and not dw[3].any() and dw[2].any()


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once_at_the_end(name):
  group_sizes = [100, 0, 70, 90, 30]
  x, w, dy = draw(jnp.bfloat16)
  got = RUN[name](poison(x, group_sizes), w, jnp.array(group_sizes, jnp.int32), poison(dy, group_sizes))
  for a, b in zip(got, loop(x, w, group_sizes, dy)):
    assert a.dtype == jnp.bfloat16
    # Rounding to 8 significant bits is off by at most 2^-8 of the value; the rest is float32 accumulation.
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=300 * 2**-24 * 16)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_bfloat16_products_are_summed_in_float32(name):
  # 256 + 1 is 256 in bfloat16, so a bfloat16 sum of these four would be 0 and not 2.
  x = jnp.array([[256, 1, 1, -256]], jnp.bfloat16)
  y = grouped_matmul(x, jnp.ones((1, 4, 1), jnp.bfloat16), jnp.array([1]), implementation=name)
  assert y.tolist() == [[2.]]


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_no_rows_give_no_outputs_and_zero_gradients(name):
  w = jnp.ones((E, D, F))
  x = jnp.ones((0, D))
  run = lambda x, w: grouped_matmul(x, w, jnp.zeros(E, jnp.int32), implementation=name)
  y, pull = jax.vjp(run, x, w)
  dx, dw = pull(y)
  assert y.shape == (0, F) and dx.shape == (0, D) and dw.shape == w.shape and not dw.any()


def test_xla_works_on_few_rows_more_than_there_are(monkeypatch):
  """The rows it multiplies, counted while it runs, exceed M by less than one small block a group."""
  worked = []
  dot = xla._dot

  def counting(a, b, contract):
    jax.debug.callback(lambda: worked.append(a.shape[0]))
    return dot(a, b, contract)

  monkeypatch.setattr(xla, '_dot', counting)
  x, w, dy = draw(jnp.float32)
  group_sizes = jnp.array([129, 0, 1, 65, 105])
  _, small_block = xla.block_sizes(M, E)
  for function, arguments in [(xla.matmul, (x, w)), (xla.weight_gradient, (x, dy))]:
    worked.clear()
    jax.block_until_ready(function(*arguments, group_sizes))
    jax.effects_barrier()
    assert M <= sum(worked) < M + E * small_block


def test_xla_holds_nothing_of_the_size_of_the_dense_form():
  """Every row times every matrix needs E*M*D floats; a loop over blocks needs outputs, and a block or two."""
  m, d, f, e = 512, 32, 32, 16
  group_sizes = jnp.full(e, m // e)

  def temporary_bytes(name):
    loss = lambda x, w: (grouped_matmul(x, w, group_sizes, implementation=name)**2).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((m, d)), jnp.ones((e, d, f))).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes('reference') >= 4 * e * m * d > 4 * temporary_bytes('xla')


@pytest.mark.parametrize('rows, groups, expected', [
    (4096, 8, (256, 64)),  # 512 rows a group: the largest block
    (4096, 32, (128, 32)),
    (4096, 100, (64, 16)),  # 40 rows a group: the smallest
    (300, 5, (64, 16)),
    (20, 2, (20, 16)),  # never more than there are rows
    (3, 8, (3, 3)),
])
def test_blocks_are_the_power_of_two_below_the_rows_of_a_group_between_64_and_256(rows, groups, expected):
  assert xla.block_sizes(rows, groups) == expected


def test_the_platform_picks_the_implementation_where_none_is_named():
  assert default_implementation() == 'xla'  # tests run on CPUs
  x, w, _ = draw(jnp.float32)
  group_sizes = jnp.array([100, 0, 70, 0, 30])
  np.testing.assert_array_equal(grouped_matmul(x, w, group_sizes),
                                grouped_matmul(x, w, group_sizes, implementation='xla'))


@pytest.mark.parametrize('change, message', [
    (dict(implementation='dense'), "no implementation 'dense'; there are ragged_dot, reference, xla"),
    (dict(group_sizes=jnp.zeros(E + 1, jnp.int32)), 'group_sizes'),
    (dict(group_sizes=jnp.zeros(E)), 'whole group_sizes'),
    (dict(x=jnp.zeros((M, D + 1))), r'x \[M,D\]'),
    (dict(x=jnp.zeros((M, D), jnp.bfloat16)), 'one dtype'),
])
def test_what_does_not_fit_is_refused(change, message):
  arguments = dict(x=jnp.zeros((M, D)), w=jnp.zeros((E, D, F)), group_sizes=jnp.zeros(E, jnp.int32))
  with pytest.raises(ValueError, match=message):
    grouped_matmul(**arguments | change)
