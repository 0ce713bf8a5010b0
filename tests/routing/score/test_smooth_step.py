"""Differentiable sparse gates: identities from the papers; gradients against float64 differences."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.balance import selectors
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.comet import mixture_of_leaves
from moejax.routing.score import smooth_step
from routing_reference import run
from tests import checked_shapes

D = 3


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('gamma', [0.3, 1., 4.])
def test_the_step_is_the_cubic_that_reaches_0_and_1_with_zero_slope(gamma):
  step = lambda z: smooth_step.smooth_step(z, gamma)
  z = jnp.asarray([-9., -gamma / 2, -gamma / 4, 0, gamma / 4, gamma / 2, 9])
  # At a quarter of gamma: -2/64 + 3/8 + 1/2 = 27/32.
  np.testing.assert_allclose(step(z), [0, 0, 5 / 32, 1 / 2, 27 / 32, 1, 1], rtol=1e-6)
  slope = jax.vmap(jax.grad(step))(z)
  np.testing.assert_allclose(slope * gamma, [0, 0, 9 / 8, 3 / 2, 9 / 8, 0, 0], atol=1e-6)
  assert float(step(z[0])) == 0 and float(step(z[-1])) == 1


def test_the_step_is_continuously_differentiable():
  z = jnp.linspace(-0.6, 0.6, 2401)  # 0.0005 apart, over both ends of the step
  step = lambda z: smooth_step.smooth_step(z, 1.)
  values, slopes = step(z), jax.vmap(jax.grad(step))(z)
  # Its slope is at most 3/2, and the slope's own is at most 6: neither jumps.
  assert np.abs(np.diff(values)).max() <= 1.5 * 0.0005 + 1e-6
  assert np.abs(np.diff(slopes)).max() <= 6 * 0.0005 + 1e-5
  # Float64 differences of the formula, at points inside and outside.
  def formula(z):
    return np.where(z <= -.5, 0, np.where(z >= .5, 1, -2 * z**3 + 1.5 * z + .5))
  exact = np.asarray(z, np.float64)
  np.testing.assert_allclose(slopes, (formula(exact + 1e-6) - formula(exact - 1e-6)) / 2e-6, atol=1e-4)


def test_nothing_far_away_spoils_a_gradient():
  assert float(jax.grad(lambda z: smooth_step.smooth_step(z, 1.))(1e30)) == 0


# ---- codes and trees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_experts', [1, 2, 5, 8])
def test_codes_are_binary_numbers_with_the_most_significant_digit_first(num_experts):
  codes = smooth_step.binary_codes(num_experts)
  digits = len(f'{num_experts - 1:b}') if num_experts > 1 else 0
  assert codes.shape == (num_experts, digits)
  for expert, code in enumerate(codes):
    assert int(''.join(str(int(bit)) for bit in code) or '0', 2) == expert


@pytest.mark.parametrize('num_experts', [1, 2, 3, 5, 8])
def test_codes_and_trees_equal_loops(num_experts):
  generator = np.random.default_rng(num_experts)
  codes, bits = smooth_step.binary_codes(num_experts), smooth_step.binary_codes(num_experts).shape[1]
  steps = generator.random((4, bits))
  expected = np.ones((4, num_experts))
  for expert, bit in np.ndindex(num_experts, bits):
    expected[:, expert] *= steps[:, bit] if codes[expert, bit] else 1 - steps[:, bit]
  np.testing.assert_allclose(smooth_step.select_by_code(jnp.asarray(steps), num_experts), expected,
                             atol=1e-6)  # 1 - s in float32
  power_of_two = num_experts & (num_experts - 1) == 0
  assert np.allclose(expected.sum(1), 1) == power_of_two  # a partition of unity on the hypercube

  steps = generator.random((4, num_experts - 1))
  nodes = {0: np.ones(4)}
  for node in range(num_experts - 1):  # down the heap
    nodes[2 * node + 1], nodes[2 * node + 2] = nodes[node] * steps[:, node], nodes[node] * (1 - steps[:, node])
  leaves = np.stack([nodes[num_experts - 1 + expert] for expert in range(num_experts)], axis=1)
  ours = smooth_step.select_by_tree(jnp.asarray(steps), num_experts)
  np.testing.assert_allclose(ours, leaves, atol=1e-6)
  np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-6)  # for any number of experts


# ---- the gates ------------------------------------------------------------------------------------------------------


def gate(name, num_experts=8, scale=1., dim=D, **options):
  fragment = getattr(papers, name)(**options)
  module = router.build(fragment, 'config.router', dim=dim, num_experts=num_experts, rngs=nnx.Rngs(0))
  generator = np.random.default_rng(0)
  for _, variable in nnx.to_flat_state(nnx.state(module.score, nnx.Param)):
    variable[...] = jnp.asarray(generator.normal(0, scale, variable.shape), jnp.float32)
  return module


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, D)), jnp.float32)


def assign(module, **values):
  for name, value in values.items():
    getattr(module.score, name)[...] = jnp.asarray(value, jnp.float32)


@pytest.mark.parametrize('name', ['dselect_k', 'comet'])
def test_a_saturated_gate_has_at_most_k_experts_whose_weights_sum_to_one(name):
  module = gate(name, k=3)
  for part in dict(dselect_k=('codes', 'codes_bias'), comet=('nodes', 'nodes_bias'))[name]:
    assign(module, **{part: 1e4 * getattr(module.score, part)[...]})  # every |z| is far above gamma / 2
  weight = np.asarray(run(module, X, RouterInputs(), train=True).plan.weight)
  assert (np.count_nonzero(weight, axis=-1) <= 3).all() and (np.count_nonzero(weight, axis=-1) > 1).any()
  np.testing.assert_allclose(weight.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize('name', ['dselect_k', 'comet'])
def test_a_gate_starts_with_all_experts_equal(name):
  fragment = getattr(papers, name)(k=2)
  module = router.build(fragment, 'config.router', dim=D, num_experts=8, rngs=nnx.Rngs(0))
  weight = run(module, X, RouterInputs(), train=True).plan.weight
  # Steps start within 1.5 * 0.01 * (1 + |x|_1) / gamma of 1/2, leaves within 0.05 (1 + |x|_1) of 0; |x|_1 < 6 here.
  np.testing.assert_allclose(weight, 1 / 8, atol=0.08)
  assert np.abs(X).sum(-1).max() < 6


def test_dselect_k_is_the_mixture_of_its_selectors():
  module = gate('dselect_k', scale=0.2, k=2)
  score = {name: np.asarray(getattr(module.score, name)[...], np.float64)
           for name in ('codes', 'codes_bias', 'weights', 'weights_bias')}
  x = np.asarray(X[0, 0], np.float64)
  z = np.clip(x @ score['codes'] + score['codes_bias'], -.5, .5).reshape(2, 3)
  s = -2 * z**3 + 1.5 * z + .5
  w = np.exp(x @ score['weights'] + score['weights_bias'])
  expected = sum(w[i] / w.sum() * np.kron(np.kron([1 - s[i, 0], s[i, 0]], [1 - s[i, 1], s[i, 1]]),
                                          [1 - s[i, 2], s[i, 2]]) for i in range(2))
  np.testing.assert_allclose(run(module, X, RouterInputs(), train=True).plan.weight[0, 0], expected, rtol=1e-5)


def test_the_static_gate_of_dselect_k_depends_only_on_the_task():
  module = gate('dselect_k', scale=0.3, k=2, gate='task', tasks=2)
  tasks = jnp.asarray([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0]])
  weight = np.asarray(run(module, X, RouterInputs(tasks=tasks), train=True).plan.weight)
  for task in (0, 1):
    rows = weight[np.asarray(tasks) == task]
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[0], rows.shape))
  assert not np.allclose(weight[0, 0], weight[0, 2])
  weight = np.asarray(run(gate('dselect_k', scale=0.3, k=2, gate='task'), X, RouterInputs(), train=True).plan.weight)
  np.testing.assert_array_equal(weight, np.broadcast_to(weight[0, 0], weight.shape))


def test_several_tasks_need_to_be_looked_at():
  fragment = papers.dselect_k(k=2, gate='task', tasks=2) | dict(features=dict(name='token'))
  with pytest.raises(ConfigError, match="needs features=dict\\(name='tasks'\\) for several tasks"):
    router.build(fragment, 'config.router', dim=D, num_experts=4, rngs=nnx.Rngs(0))


def test_one_tree_over_two_experts_is_the_smooth_step():
  module = gate('comet', num_experts=2, scale=0.3, k=1)
  # Leaves with equal logits: the softmax of log(pi) is pi.
  assign(module, leaves=np.zeros((D, 1, 2)), leaves_bias=np.zeros((1, 2)))
  z = np.asarray(X) @ np.asarray(module.score.nodes[...])[:, 0] + np.asarray(module.score.nodes_bias[...])[0]
  left = smooth_step.smooth_step(jnp.asarray(z[..., 0]), 1.)
  np.testing.assert_allclose(run(module, X, RouterInputs(), train=True).plan.weight, np.stack([left, 1 - left], -1),
                             rtol=1e-5, atol=1e-6)


def test_comet_is_one_softmax_over_the_leaves_of_all_trees():
  generator = np.random.default_rng(3)
  leaves = generator.dirichlet(np.ones(4), 2)
  leaves[0, 1] = 0
  logits = generator.normal(size=(2, 4))
  logits[0, 1] = 200.  # exp(200) is no float32; the leaf is not reached and must not matter
  with np.errstate(divide='ignore'):
    scores = logits + np.log(leaves)
  expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
  ours, gradient = jax.value_and_grad(lambda leaves, logits: mixture_of_leaves(leaves, logits)[0, 0], argnums=(0, 1))(
      jnp.asarray(leaves), jnp.asarray(logits))
  assert float(ours) == pytest.approx(expected[0, 0], rel=1e-5)
  # d q_00 / d logits = q_00 (1[this leaf] - q); the largest logit of all reached ones is among them.
  np.testing.assert_allclose(gradient[1], expected[0, 0] * ((np.arange(8) == 0).reshape(2, 4) - expected), atol=1e-6)
  assert np.isfinite(gradient[0]).all()


def test_a_leaf_that_is_hardly_reached_may_have_the_largest_logit():
  leaves, logits = np.array([[1e-25, .6, .4]]), np.array([[70., -40., -41.]])
  scores = logits + np.log(leaves)
  shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
  ours = lambda logits: mixture_of_leaves(jnp.float32(leaves), logits)[0]
  np.testing.assert_allclose(ours(jnp.float32(logits)), shares[0], rtol=1e-4)
  np.testing.assert_allclose(jax.jacobian(ours)(jnp.float32(logits))[:, 0], np.diag(shares[0]) - np.outer(*2 * [shares[0]]),
                             atol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.jacobian(mixture_of_leaves)(jnp.float32(leaves), jnp.float32(logits)))


@pytest.mark.parametrize('name, num_experts, options', [
    ('dselect_k', 8, {}), ('dselect_k', 5, {}), ('comet', 8, {}), ('comet', 5, {}), ('comet', 5, dict(gamma=4.))])
def test_gradients_equal_finite_differences_everywhere(name, num_experts, options):
  """Tokens inside the step, outside of it, and at its ends, in float64: central differences are good to 1e-8."""
  with jax.enable_x64(True), checked_shapes.off():  # routers are annotated as float32
    module = gate(name, num_experts=num_experts, scale=0.3, k=2, **options)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    towards = jnp.asarray(np.random.default_rng(5).normal(size=(1, 40, num_experts)))
    x = jnp.asarray(np.random.default_rng(6).normal(size=(1, 40, D)) * np.linspace(0.1, 5, 40)[:, None])

    @jax.jit
    @jax.value_and_grad
    def objective(params):
      out = nnx.merge(graph, params, rest)(x, RouterInputs(), train=True)
      return jnp.sum(out.plan.weight * towards) + sum(out.losses.values())

    leaves, tree = jax.tree.flatten(params)
    _, gradient = objective(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    generator = np.random.default_rng(7)
    for _ in range(4):
      along = [generator.normal(size=leaf.shape) for leaf in leaves]
      moved = lambda t: tree.unflatten([leaf + t * direction for leaf, direction in zip(leaves, along)])
      slope = sum(float((g * direction).sum()) for g, direction in zip(jax.tree.leaves(gradient), along))
      difference = (objective(moved(1e-6))[0] - objective(moved(-1e-6))[0]) / 2e-6
      assert slope == pytest.approx(float(difference), rel=1e-4, abs=1e-4)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_the_entropy_of_selectors_is_zero_when_they_choose_and_log_e_each_when_they_do_not():
  even = jnp.full((1, 1, 2, 8), 1 / 8)
  sure = jnp.zeros((1, 1, 2, 8)).at[..., 3].set(1)
  # log(r + 1e-6) instead of log(r): 8e-6 for r = 1/8, 1e-6 for r = 1.
  np.testing.assert_allclose(selectors.entropy(even), 2 * np.log(8), atol=2e-5)
  np.testing.assert_allclose(selectors.entropy(sure), 0, atol=3e-6)


@pytest.mark.parametrize('reduction, factor', [('mean', 1 / 3), ('sum', 1)])
def test_losses_are_means_or_sums_over_valid_tokens(reduction, factor):
  values, valid = jnp.asarray([[1., 2, 4, 100]]), jnp.asarray([[True, True, True, False]])
  assert float(selectors.reduced(values, valid, reduction)) == pytest.approx(7 * factor)


def test_codes_that_name_no_expert_cost_what_they_take():
  """E = 3, one selector, both bits at s: codes 00, 01, 10 have (1-s)^2 + 2 s(1-s) = 1 - s^2; s(z = .25) = 27/32."""
  module = gate('dselect_k', num_experts=3, k=1, gate='task')
  assign(module, codes=[[0.25, 0.25]])
  out = run(module, X, RouterInputs(), train=True)
  reached = 1 - (27 / 32)**2
  assert float(out.metrics['reachable_loss']) == pytest.approx(1 / reached, rel=1e-5)
  np.testing.assert_allclose(out.plan.weight.sum(-1), reached, rtol=1e-5)
  assign(module, codes=[[9., 9.]])  # wholly on the code that names none
  assert np.isfinite(float(run(module, X, RouterInputs(), train=True).losses['reachable']))
