"""Local search for the order of experts: doubly stochastic, then a permutation, the one that scipy finds."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import linear_sum_assignment

from moejax import functional
from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.balance import selectors
from moejax.routing.inputs import RouterInputs
from moejax.routing.score import local_search

D, E, STEPS = 3, 6, 10
X = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, D)), jnp.float32)


@pytest.mark.parametrize('temperature', [1., 0.5])
def test_sinkhorn_gives_a_doubly_stochastic_matrix(temperature):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(E, E)), jnp.float32)
  soft = local_search.sinkhorn(logits / temperature, 150, 150)
  assert (np.asarray(soft) >= 0).all()
  np.testing.assert_allclose(soft.sum(0), 1, atol=1e-3)
  np.testing.assert_allclose(soft.sum(1), 1, atol=1e-3)


def test_sinkhorn_normalises_rows_then_columns_in_every_iteration():
  logits = np.random.default_rng(0).normal(size=(E, E))
  expected = np.exp(logits)
  for _ in range(3):
    expected /= expected.sum(1, keepdims=True)
    expected /= expected.sum(0, keepdims=True)
  np.testing.assert_allclose(local_search.sinkhorn(jnp.asarray(logits), 3, 150), expected, rtol=1e-4)


@pytest.mark.parametrize('seed', range(3))
def test_hardening_finds_the_assignment_that_scipy_finds(seed):
  soft = np.random.default_rng(seed).random((E, E))
  rows, columns = linear_sum_assignment(-soft)
  expected = np.zeros((E, E))
  expected[rows, columns] = 1
  np.testing.assert_array_equal(local_search.hardened(jnp.asarray(soft, jnp.float32)), expected)


def test_the_temperature_falls_on_a_line_of_its_logarithm():
  temperatures, iterations = zip(*(local_search.schedule(jnp.int32(step), 4) for step in (0, 1, 2, 4, 9)))
  np.testing.assert_allclose(temperatures, [1e-3, 1e-4, 1e-5, 1e-7, 1e-7], rtol=1e-4)
  np.testing.assert_array_equal(iterations, [20, 52, 85, 150, 150])  # 20 + 130 * (0, 1/4, 1/2, 1, 1), rounded down


def test_the_entropy_of_a_permutation_is_zero_and_of_the_mean_of_all_2_e_log_e():
  assert float(selectors.permutation_entropy(jnp.eye(E)[::-1])) == pytest.approx(0, abs=2e-5)
  even = jnp.full((E, E), 1 / E)
  assert float(selectors.permutation_entropy(even)) == pytest.approx(2 * E * np.log(E), rel=1e-4)


@pytest.fixture(scope='module')
def routed():
  built = functional.functionalize(lambda rngs: router.build(
      papers.comet(k=2, search_steps=STEPS), 'config.router', dim=D, num_experts=E, rngs=rngs))
  params, state = built.init(jax.random.key(0))
  train = jax.jit(lambda params, state: built.apply(params, state, X, RouterInputs(), train=True))
  evaluate = jax.jit(lambda params, state: built.apply(params, state, X, RouterInputs(), train=False))
  return params, state, train, evaluate


def test_it_searches_then_keeps_the_nearest_permutation_for_any_later_logits(routed):
  params, state, train, evaluate = routed
  slopes = jax.jit(jax.grad(lambda logits, state: (train(
      params | dict(score=params['score'] | dict(search=dict(logits=logits))), state).plan.weight[0, :, 1]).sum()))
  logits = params['score']['search']['logits']
  for step in range(STEPS):
    out = train(params, state)
    state = functional.merge_updates(state, out.updates)
    search = state['score']['search']
    assert int(search['step']) == step + 1
    np.testing.assert_allclose(search['soft'].sum(0), 1, atol=1e-3)
    np.testing.assert_allclose(out.plan.weight.sum(-1), 1, atol=1e-5)
    # Evaluation always has a permutation.
    hard = local_search.hardened(search['soft'])
    rows, columns = linear_sum_assignment(-np.asarray(search['soft'], np.float64))
    np.testing.assert_array_equal(np.argmax(hard, axis=1)[rows], columns)
  frozen = state['score']['search']['soft']
  other = params | dict(score=params['score'] | dict(search=dict(logits=-logits)))
  for changed in (params, other):
    out = train(changed, state)
    np.testing.assert_array_equal(out.updates['score']['search']['soft'], frozen)
    np.testing.assert_array_equal(out.plan.weight, evaluate(changed, state).plan.weight)
    assert float(out.metrics['permutation_entropy_loss']) == pytest.approx(0, abs=2e-5)
  np.testing.assert_array_equal(slopes(logits, state), 0)
  assert np.isfinite(slopes(logits, routed[1])).all()


def test_the_permutation_moves_the_shares_of_the_leaves(routed):
  params, state, _, evaluate = routed
  order = np.array([2, 0, 5, 1, 4, 3])
  moved = functional.merge_updates(state, dict(score=dict(search=dict(soft=jnp.eye(E)[order]))))
  # Row e of the matrix says where the share of leaf e goes; their sum, by which they are divided, rounds differently.
  np.testing.assert_allclose(evaluate(params, moved).plan.weight[..., order], evaluate(params, state).plan.weight,
                             rtol=1e-6)


def test_a_search_takes_at_least_a_step():
  with pytest.raises(ConfigError, match='config.router.score.search_steps must be an int of at least 1'):
    router.build(papers.comet(search_steps=0), 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
