"""The implementations in plain JAX, and properties of the one for CPUs."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from implementation_tests import ImplementationTests
from moejax.kernels import Routes, Weights, expert_block, grouped_matmul, xla


class TestReference(ImplementationTests):
  name = 'reference'


class TestXla(ImplementationTests):
  name = 'xla'


class TestRaggedDot(ImplementationTests):
  name = 'ragged_dot'


@given(rows=st.integers(1, 20_000), groups=st.integers(1, 300))
def test_a_blocks_last_size_is_the_whole_block_and_none_exceeds_the_rows(rows, groups):
  sizes = xla.block_sizes(rows, groups)
  assert 0 < sizes[0] and list(sizes) == sorted(set(sizes)) and sizes[-1] <= min(rows, 400)


@pytest.mark.parametrize('rows, groups', [(8192, 8), (8192, 32), (8192, 64)])
def test_a_group_of_usual_size_is_covered_with_little_to_spare(rows, groups):
  sizes, usual = xla.block_sizes(rows, groups), rows // groups
  rest = usual % sizes[-1]
  worked = usual - rest + min((size for size in sizes if size >= rest), default=0)
  assert worked <= 1.1 * usual


def counted(function):
  """`function` with the rows that its products see, counted while it runs."""
  worked = []

  def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
      dot = xla.dot

      def counting(a, b, contract):
        jax.debug.callback(lambda: worked.append(a.shape[0]))
        return dot(a, b, contract)
      patch.setattr(xla, 'dot', counting)
      jax.block_until_ready(function(*arguments))
      jax.effects_barrier()
    return sum(worked)
  return run


def test_few_rows_more_are_multiplied_than_there_are():
  M, D, F, E = 300, 4, 6, 5
  rng = np.random.RandomState(0)
  x, w, dy = rng.randn(M, D), rng.randn(E, D, F), rng.randn(M, F)
  sizes = jnp.array([129, 0, 1, 65, 105])
  step = xla.block_sizes(M, E)[0]
  for function, arguments in [(xla.matmul, (x, w)), (xla.weight_gradient, (x, dy))]:
    worked = counted(function)(*(jnp.array(a) for a in arguments), sizes)
    assert M <= worked < M + E * step


def temporary_bytes(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_the_grouped_matmul_holds_nothing_of_the_size_of_the_dense_form():
  """Every row times every matrix needs E*M*D floats; a loop over blocks needs outputs, and a block or two."""
  m, d, f, e = 512, 32, 32, 16
  sizes = jnp.full(e, m // e)

  def used(name):
    loss = lambda x, w: (grouped_matmul(x, w, sizes, implementation=name)**2).sum()
    return temporary_bytes(jax.grad(loss, (0, 1)), jnp.ones((m, d)), jnp.ones((e, d, f)))
  assert used('reference') >= 4 * e * m * d > 4 * used('xla')


def test_the_fused_block_keeps_pre_activations_and_nothing_else_of_their_size():
  """Forward and backward hold one [M,F], and in inference none; a dense layer holds several."""
  n, k, d, f, e = 4096, 2, 16, 512, 4
  weights = Weights(jnp.ones((e, d, f)), jnp.ones((e, f, d)))
  choice = jnp.arange(n * k)
  routes = Routes(choice // k, jnp.ones(n * k), jnp.full(e, n * k // e), choice.reshape(n, k))
  fused = lambda x, weights: (expert_block(x, weights, routes, activation='gelu', implementation='xla')**2).sum()
  dense = lambda x, weights: ((jax.nn.gelu(jnp.repeat(x, k, 0) @ weights.wi[0]) @ weights.wo[0])**2).sum()
  x = jnp.ones((n, d))
  hidden = 4 * n * k * f
  block = 4 * f * xla.block_sizes(n * k, e)[-1]
  # In a block: pre-activations, their tanh, what becomes of them and both gradients; and room after the last row.
  assert hidden <= temporary_bytes(jax.grad(fused, (0, 1)), x, weights) < hidden + 6 * block < 1.4 * hidden
  assert temporary_bytes(fused, x, weights) < 2 * block + 4 * n * d
  assert temporary_bytes(jax.grad(dense, (0, 1)), x, weights) >= 2 * hidden


def test_rows_that_a_block_has_too_many_reach_nothing_even_if_they_are_nan():
  rng = np.random.RandomState(0)
  token = jnp.arange(64)
  routes = Routes(token, jnp.ones(64), jnp.array([5, 59]), token[:, None])  # a block of the first has rows of the second
  x = jnp.array(rng.randn(64, 4))
  weights = Weights(jnp.array(rng.randn(2, 4, 6)), jnp.array(rng.randn(2, 6, 4)))

  def of_the_first(x):
    loss = lambda x, weights: expert_block(x, weights, routes, activation='gelu', implementation='xla')[:5].sum()
    value, (dx, dweights) = jax.value_and_grad(loss, (0, 1))(x, weights)
    return value, dx[:5], dweights.wi[0], dweights.wo[0]

  expected = of_the_first(x)
  assert all(jnp.isfinite(a).all() and a.any() for a in expected)
  jax.tree.map(np.testing.assert_array_equal, of_the_first(x.at[5:].set(jnp.nan)), expected)
