"""Variants of Expert Choice: Mesh TensorFlow's and strictly balanced gating, against
float64 loops over experts and tokens.
"""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.mtf_expert_choice import token_balance_loss
from moejax.routing.papers.strictly_balanced import threshold_loss
import routing_reference as reference

G, S, E, D = 2, 24, 4, 8
X = jax.random.normal(jax.random.key(0), (G, S, D))
VALID = np.ones((G, S), bool)
VALID[1, 20:] = False


def route(fragment, train, x=X, **inputs):
  built = router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
  built.score.kernel[...] = jax.random.normal(jax.random.key(2), (D, E))
  inputs = RouterInputs(valid=jnp.asarray(VALID), **inputs)
  return built, reference.run(built, x, inputs, key=jax.random.key(0), train=train)


def logits(built):
  return np.asarray(X, np.float64) @ np.asarray(built.score.kernel[...], np.float64)


def best_of_columns(values, slots):
  """Which tokens are among the `slots` valid ones that score highest with an expert: <bool>[G,S,E]."""
  taken = np.zeros(values.shape, bool)
  for g, e in np.ndindex(G, E):
    ranked = sorted(np.flatnonzero(VALID[g]), key=lambda s: -values[g, s, e])
    taken[g, ranked[:slots], e] = True
  return taken


def test_mesh_tensorflow_weighs_by_a_softmax_over_tokens():
  """And over the number of experts that took the token; 24 tokens * 2.0 / 4 experts = 12 slots at evaluation."""
  built, out = route(papers.mtf_expert_choice(), train=False)
  values = logits(built)
  taken = best_of_columns(values, 12)
  expected = np.zeros((G, S, E))
  for g, e in np.ndindex(G, E):
    softmax = reference.softmax(values[g, VALID[g], e])
    expected[g, VALID[g], e] = softmax
  expected = np.where(taken, expected / np.maximum(taken.sum(-1, keepdims=True), 1), 0)
  np.testing.assert_allclose(out.plan.to_dense().weight, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('train, slots', [(True, 7), (False, 12)])  # int(24 * 1.25 / 4) and int(24 * 2 / 4)
def test_mesh_tensorflow_has_more_slots_at_evaluation(train, slots):
  assert route(papers.mtf_expert_choice(), train)[1].plan.capacity == slots


def test_the_token_balance_loss_is_one_where_tokens_get_the_same_and_n_where_one_gets_all():
  even, one = np.zeros((G, S, E), np.float32), np.zeros((G, S, E), np.float32)
  one[:, 0] = 100.
  assert token_balance_loss(even, VALID) == pytest.approx(1, rel=1e-6)
  assert token_balance_loss(one, VALID) == pytest.approx((24 + 20) / 2, rel=1e-6)  # mean over groups of n
  assert token_balance_loss(even, np.zeros_like(VALID)) == 0


def test_the_batchwise_choice_is_a_sort_of_every_column():
  """m = k|X|/n = 2 * 24 / 4 = 12; gates are normalised over the experts that took the token (equation 16)."""
  built, out = route(papers.strictly_balanced(k=2), train=True)
  gates = reference.softmax(logits(built))
  taken = best_of_columns(gates, 12)
  kept = np.where(taken, gates, 0)
  expected = kept / np.where(taken.any(-1, keepdims=True), kept.sum(-1, keepdims=True), 1)
  np.testing.assert_array_equal(out.plan.shares(), taken)
  np.testing.assert_allclose(out.plan.to_dense().weight, expected, rtol=1e-5)


def test_at_evaluation_experts_take_tokens_above_their_thresholds():
  built, _ = route(papers.strictly_balanced(k=2), train=False)
  np.testing.assert_array_equal(built.score.threshold[...], np.full(E, 1 / E))
  threshold = np.array([.1, .2, .5, 2.], np.float32)  # no gate is above 2
  built.score.threshold[...] = jnp.asarray(threshold)
  out = reference.run(built, X, RouterInputs(valid=jnp.asarray(VALID)), train=False)
  gates = reference.softmax(logits(built))
  taken = (gates > threshold) & VALID[..., None]
  kept = np.where(taken, gates, 0)
  np.testing.assert_array_equal(out.plan.shares(), taken)
  np.testing.assert_allclose(out.plan.to_dense().weight, kept / np.maximum(kept.sum(-1, keepdims=True), 1e-9), rtol=1e-5)
  assert (built.leak(True), built.leak(False)) == ('future', 'causal')


def test_the_threshold_loss_counts_misplaced_tokens_by_their_distance():
  """Gates .9 .6 .4 .2, two taken, so every threshold in [.4, .6) is right. At .7 the second is missing: (0-1)(.6-.7) = .1;
  at .3 the third is too many: (1-0)(.4-.3) = .1; both over four tokens."""
  gates = np.array([.9, .6, .4, .2], np.float32).reshape(1, 4, 1)
  taken, valid = gates > .5, np.ones((1, 4), bool)
  for threshold, expected in ((.5, 0.), (.45, 0.), (.7, .025), (.3, .025)):
    value, slope = jax.value_and_grad(threshold_loss, argnums=1)(gates, jnp.array([threshold]), taken, valid)
    assert value == pytest.approx(expected, abs=1e-7)
    assert slope[0] == pytest.approx(0.25 * np.sign(threshold - .5) * (expected > 0), abs=1e-7)


def test_learned_thresholds_let_as_many_tokens_through_as_experts_take():
  """Gradient descent on the loss alone; a threshold settles within a step of the gap between the m-th and the next."""
  gates = jnp.asarray(reference.softmax(np.random.default_rng(0).normal(size=(1, 400, E))), jnp.float32)
  taken, valid = np.zeros((1, 400, E), bool), np.ones((1, 400), bool)
  for e in range(E):
    taken[0, np.argsort(-np.asarray(gates[0, :, e]))[:100], e] = True
  def step(_, threshold):
    return threshold - 0.02 * jax.grad(threshold_loss, argnums=1)(gates, threshold, taken, valid)
  threshold = jax.lax.fori_loop(0, 500, step, jnp.full(E, 1 / E))
  np.testing.assert_allclose((gates > threshold).sum((0, 1)), 100, atol=2)
