"""Transport plans against their definitions: prescribed marginals, optimality conditions, and scipy's linear programs,
quadratic programs and assignments in float64.
"""
import itertools

from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog, minimize

from moejax import functional
from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.capped_expert_choice import capped_plan
from moejax.routing.select import optimal_transport
import routing_reference as reference

S, E, D = 16, 4, 8
ONES, SHARES = np.ones(S, np.float32), np.full(E, S / E, np.float32)
seeds = st.integers(0, 2**20)

sinkhorn = jax.jit(optimal_transport.sinkhorn, static_argnums=(3, 4))
sparse = jax.jit(optimal_transport.sparse, static_argnums=(3, 4, 5))
bounded = jax.jit(optimal_transport.bounded, static_argnums=(4, 5))
project = jax.jit(optimal_transport.project_to_sparse_simplex, static_argnums=1)


def scores(seed, shape=(S, E)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear_program(scores, of_rows, of_columns, upper=None):
  """max <P, scores> over plans with these sums: scipy's value."""
  rows, columns = scores.shape
  sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
  bounds = [(0, None if upper is None else bound) for bound in np.broadcast_to(upper, scores.shape).ravel()]
  solved = linprog(-scores.ravel().astype(np.float64), A_eq=sums, b_eq=np.concatenate([of_rows, of_columns]),
                   bounds=bounds)
  assert solved.success
  return -solved.fun


@pytest.mark.parametrize('epsilon, iterations', [(1., 20), (0.1, 400)])
def test_sinkhorn_plans_have_the_prescribed_marginals(epsilon, iterations):
  tokens = ONES.copy()
  tokens[3:6] = 0  # padding
  experts = np.array([1., 2., 4., 6.], np.float32)
  plan = np.asarray(sinkhorn(scores(0), tokens, experts, epsilon, iterations))
  np.testing.assert_allclose(plan.sum(1), tokens, atol=1e-5)
  np.testing.assert_allclose(plan.sum(0), experts, atol=1e-3)
  assert (plan[3:6] == 0).all()


def test_sinkhorn_plans_are_optimal():
  """Of a concave problem with linear constraints the optimum is where the gradient is a sum of potentials: scores -
  epsilon * log(plan) = u_t + v_e, so that differences within a row are the same in all rows."""
  values = scores(1)
  plan = np.asarray(sinkhorn(values, ONES, SHARES, 0.5, 50), np.float64)
  potentials = values - 0.5 * np.log(plan)
  differences = potentials[:, 1:] - potentials[:, :1]
  np.testing.assert_allclose(differences, differences[:1] + np.zeros_like(differences), atol=1e-4)


def test_with_little_entropy_s_base_is_the_assignment_of_base():
  values = scores(2)
  slots = np.repeat(values, S // E, axis=1)
  best = linear_sum_assignment(slots, maximize=True)[1] // (S // E)
  np.testing.assert_array_equal(sinkhorn(values, ONES, SHARES, 0.01, 2000).argmax(1), best)


@given(seeds, st.integers(1, 6), st.sampled_from([0.1, 1., 5.]))
def test_the_projection_is_the_nearest_point_with_few_non_zeros(seed, k, scale):
  """Against every support of at most k of 6 entries; on each the simplex by bisection for its threshold."""
  x = scale * scores(seed, (6, 1))
  projected = np.asarray(project(x, k), np.float64)[:, 0]
  def on_support(support):
    chosen = x[list(support), 0].astype(np.float64)
    low, high = chosen.min() - 1, chosen.max()
    for _ in range(60):
      middle = (low + high) / 2
      low, high = (middle, high) if np.maximum(chosen - middle, 0).sum() > 1 else (low, middle)
    point = np.zeros(6)
    point[list(support)] = np.maximum(chosen - low, 0)
    return point
  nearest = min((on_support(support) for support in itertools.combinations(range(6), k)),
                key=lambda point: np.sum((point - x[:, 0])**2))
  assert (projected > 0).sum() <= k
  np.testing.assert_allclose(projected, nearest, atol=2e-6 * max(scale, 1))


def test_without_a_limit_sparse_transport_is_the_quadratic_program():
  """max <P, M> - |P|^2/2 over plans of equal shares: scipy's SLSQP on 6 x 3 entries."""
  values = scores(3, (6, 3))
  tokens, experts = np.ones(6), np.full(3, 2.)
  sums = [dict(type='eq', fun=lambda p: p.reshape(6, 3).sum(1) - tokens),
          # The last of these sums follows from the others.
          dict(type='eq', fun=lambda p: (p.reshape(6, 3).sum(0) - experts)[:-1])]
  solved = minimize(lambda p: p @ p / 2 - p @ values.ravel(), np.full(18, 1 / 3), jac=lambda p: p - values.ravel(),
                    bounds=[(0, None)] * 18, constraints=sums, options=dict(ftol=1e-12, maxiter=500))
  assert solved.success
  plan = sparse(values, tokens.astype(np.float32), experts.astype(np.float32), 6, 1., 2000)
  np.testing.assert_allclose(plan, solved.x.reshape(6, 3), atol=2e-3)  # what Adam leaves at this rate


def test_with_little_regularisation_sparse_transport_is_the_linear_program():
  values = scores(4)
  plan = sparse(values, ONES, SHARES, S, 0.05, 3000)
  np.testing.assert_allclose(plan.sum(1), 1, atol=0.05)
  # The quadratic term can cost at most gamma/2 (|P|^2 - |P'|^2) < 0.05/2 * S.
  assert np.sum(plan * values) == pytest.approx(linear_program(values, ONES, SHARES), abs=0.4)


@given(seeds, st.integers(1, S), st.sampled_from([0.1, 1.]))
def test_columns_have_their_sums_and_few_non_zeros_after_any_number_of_iterations(seed, k, gamma):
  tokens = ONES.copy()
  tokens[-2:] = 0
  shares = SHARES * (S - 2) / S
  plan = np.asarray(sparse(scores(seed), tokens, shares, k, gamma, 3))
  np.testing.assert_allclose(plan.sum(0), shares, rtol=1e-5)
  assert (plan >= 0).all() and ((plan > 0).sum(0) <= k).all() and (plan[-2:] == 0).all()


# Entropy of weight 0.001 over 64 entries and their rests, each at most ln 2 nats, costs less than 0.1.
@pytest.mark.parametrize('upper', [1., 0.6])
def test_bounded_plans_equal_the_linear_program(upper):
  values, rows = scores(5), np.full(S, 2., np.float32)
  columns = np.full(E, 2. * S / E, np.float32)
  bounds = np.full((S, E), upper, np.float32)
  plan = np.asarray(bounded(values, rows, columns, bounds, 0.001, 10_000))
  # Potentials of size 1 are good to 1e-7 in float32, and over epsilon to 1e-4, which is relative once exponentiated.
  assert (plan >= 0).all() and (plan <= upper * (1 + 1e-3)).all()
  np.testing.assert_allclose(plan.sum(1), rows, atol=2e-2)
  np.testing.assert_allclose(plan.sum(0), columns, atol=2e-2)
  assert np.sum(plan * values) == pytest.approx(linear_program(values, rows, columns, upper), abs=0.1)


def test_bounded_plans_of_two_by_two_are_as_seen():
  """1 + 1.1 > 1.5 + 0.5, so the diagonal; where its first entry is forbidden, the other two."""
  values, ones = np.array([[1., 1.5], [0.5, 1.1]], np.float32), np.ones(2, np.float32)
  free, forbidden = np.ones((2, 2), np.float32), np.array([[0, 1], [1, 1]], np.float32)
  np.testing.assert_allclose(bounded(values, ones, ones, free, 0.001, 100), np.eye(2), atol=1e-2)
  np.testing.assert_allclose(bounded(values, ones, ones, forbidden, 0.001, 100), np.eye(2)[::-1], atol=1e-2)


def test_bounded_plans_are_feasible_with_much_entropy_after_fifty_iterations():
  """lingvo's setting: epsilon = 0.1, 50 iterations."""
  gates = reference.softmax(scores(6)).astype(np.float32)
  plan = np.asarray(capped_plan(gates, np.ones(S, bool), slots=S // E, cap=2., epsilon=0.1, iterations=50))
  np.testing.assert_allclose(plan.sum(0), S // E, atol=1e-3)
  assert (plan <= 1 + 1e-6).all() and (plan.sum(1) <= 2 + 1e-3).all()


def route(fragment, x, train=True, num_experts=E):
  built = router.build(fragment, 'config.router', dim=x.shape[-1], num_experts=num_experts, rngs=nnx.Rngs(0))
  built.score.kernel[...] = jax.random.normal(jax.random.key(2), built.score.kernel.shape)
  return built, reference.run(built, x, RouterInputs(), train=train)


def experts_a_token(output):
  return np.asarray(output.plan.shares().sum(-1))


def test_the_cap_keeps_experts_from_taking_the_same_tokens():
  # The last tokens are long, so that every expert wants them or nobody does.
  x = jax.random.normal(jax.random.key(0), (2, 32, D)) * jnp.linspace(0.1, 1., 32)[:, None]
  free = experts_a_token(route(papers.expert_choice(capacity_factor=1.5), x)[1])
  capped = experts_a_token(route(papers.capped_expert_choice(capacity_factor=1.5, cap=2., iterations=500), x)[1])
  assert free.max() > 2 and capped.max() == 2
  np.testing.assert_array_equal(capped.sum(1), free.sum(1))  # all slots are filled either way


def test_a_cap_of_all_experts_has_no_effect():
  x = jax.random.normal(jax.random.key(0), (2, S, D))
  free, capped = (route(fragment, x)[1].plan for fragment in (
      papers.expert_choice(capacity_factor=1.), papers.capped_expert_choice(capacity_factor=1., cap=8., epsilon=0.1,
                                                                            iterations=200)))
  np.testing.assert_array_equal(free.shares(), capped.shares())
  np.testing.assert_allclose(free.to_dense().weight, capped.to_dense().weight, rtol=1e-6)


def test_by_lingvo_gates_are_a_softmax_over_tokens_and_the_plan_counts_in_the_weight():
  x = jax.random.normal(jax.random.key(0), (1, S, D))
  built, out = route(papers.capped_expert_choice(capacity_factor=1., epsilon=0.1, iterations=50,
                                                 rank='plan_times_gate'), x)
  gates = reference.softmax(x[0] @ built.score.kernel[...], axis=0).astype(np.float32)
  product = capped_plan(gates, np.ones(S, bool), S // E, 2., 0.1, 50) * gates
  expected = np.zeros((S, E))
  for e in range(E):
    best = np.argsort(-product[:, e], kind='stable')[:S // E]
    expected[best, e] = product[best, e]
  np.testing.assert_allclose(out.plan.to_dense().weight[0], expected, rtol=1e-4)


def test_by_lingvo_the_router_learns_through_gates_not_through_the_plan():
  """d/dW of sum_te c_te A_te S_te with A and the choice fixed, S a softmax over tokens, by differences in float64."""
  x, kernel, counts, direction = (scores(seed, shape) for seed, shape in enumerate([(S, D), (D, E), (S, E), (D, E)]))
  fragment = papers.capped_expert_choice(capacity_factor=1., epsilon=0.1, iterations=50, rank='plan_times_gate')
  apply = functional.functionalize(
      lambda rngs: router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=rngs)).apply

  def loss(kernel):
    weight = apply(dict(score=dict(kernel=kernel)), {}, x[None], RouterInputs(), train=True).plan.to_dense().weight[0]
    return jnp.sum(counts * weight), weight

  gradient, weight = jax.jit(jax.grad(loss, has_aux=True))(kernel)
  gates = lambda step: reference.softmax(x.astype(np.float64) @ (kernel + step * direction.astype(np.float64)), axis=0)
  fixed = counts * np.asarray(weight) / gates(0)
  slope = ((gates(1e-5) - gates(-1e-5)) * fixed).sum() / 2e-5
  assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3)


def test_a_token_s_experts_by_a_plan_are_placed_in_order_of_position():
  """As google-research/vmoe with its batch_priority=False: ceil(16*2*0.5/4) = 4 slots."""
  x = jax.random.normal(jax.random.key(0), (2, S, D))
  fragment = papers.sparse_ot_tokens(k=2, capacity_factor=0.5)
  chosen = route(fragment | dict(place=dict(name='dropless')), x)[1].plan
  kept = np.asarray(route(fragment, x)[1].plan.kept)
  for g in range(2):
    queue = reference.fill_buffers(chosen.expert[g], chosen.kept[g], E, 4, reference.choice_major(S, 2))
    assert set(zip(*np.nonzero(kept[g]))) == set(queue)
  assert kept.sum() < np.asarray(chosen.kept).sum()


@pytest.mark.parametrize('regularizer', ['sparse', 'quadratic', 'entropy'])
def test_a_transport_plan_chooses_and_the_softmax_weighs(regularizer):
  x = jax.random.normal(jax.random.key(0), (2, S, D))
  built, out = route(papers.sparse_ot(regularizer=regularizer), x)
  gates = reference.softmax(np.asarray(x @ built.score.kernel[...]))
  weight, taken = np.asarray(out.plan.to_dense().weight), np.asarray(out.plan.shares() > 0)
  np.testing.assert_allclose(weight, np.where(taken, gates, 0), rtol=1e-4)
  assert (taken.sum(1) <= S // E).all()
  if regularizer == 'entropy':
    plan = sinkhorn(np.asarray(x[0] @ built.score.kernel[...]), ONES, SHARES, 1., 20)
    best = np.argsort(-np.asarray(plan), axis=0, kind='stable')[:S // E]
    np.testing.assert_array_equal(np.sort(best, 0), np.stack([np.flatnonzero(column) for column in taken[0].T], 1))


def test_s_base_is_near_balance_in_training_where_the_best_experts_are_not_and_these_at_evaluation():
  x = jax.random.normal(jax.random.key(0), (1, 64, D)) + 1.
  built, trained = route(papers.s_base(epsilon=0.1, iterations=100, capacity_factor=8.), x)
  _, evaluated = route(papers.s_base(capacity_factor=8.), x, train=False)
  best = np.asarray(x @ built.score.kernel[...]).argmax(-1)
  np.testing.assert_array_equal(evaluated.plan.expert[..., 0], best)
  assert np.bincount(best[0], minlength=E).max() > 20 >= trained.plan.shares().sum(1).max()


@pytest.mark.parametrize('fragment, message', [
    (papers.capped_expert_choice(capacity_factor=2., cap=1.), 'config.router.select.cap = 1.0 must be at least'),
    (papers.capped_expert_choice(epsilon=0.), 'config.router.select.epsilon must be a float above 0 and of at most 1'),
    (papers.s_base(epsilon=0.), 'config.router.select.epsilon must be a float above 0'),
    (papers.sparse_ot(iterations=0), 'config.router.select.iterations must be an int of at least 1'),
    (papers.sparse_ot_tokens(k=5), 'config.router.select.k: a token cannot choose 5 of 4 experts')])
def test_what_cannot_be_is_refused(fragment, message):
  with pytest.raises(ConfigError, match=message):
    route(fragment, jnp.zeros((1, S, D)))
