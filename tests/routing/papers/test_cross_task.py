"""Cross-task routes: their formulas in float64, and what all tokens of a task share."""
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from moejax import functional
from moejax.routing import papers
from moejax.routing.papers.cross_task import straight_through, temperature
from moejax.routing.stages import SCORES
from tasks_and_documents import E, G, S, VALID, routed


def task_mlp(**config):
  return SCORES.build(dict(name='task_mlp', hidden=6, **config), 'config.score', dim=5, num_experts=E, rngs=nnx.Rngs(1))


def test_the_task_router_is_its_formula_in_float64():
  score = task_mlp(start=2.)
  t = jax.random.normal(jax.random.key(3), (G, S, 5))
  wi, bi, wo, bo = (np.asarray(v[...], np.float64) for v in (score.wi, score.bi, score.wo, score.bo))
  hidden = np.asarray(t, np.float64) @ wi + bi
  hidden *= special.ndtr(hidden)  # the exact GELU, which PyTorch's is by default
  found = score(t, key=None, train=False).logits
  np.testing.assert_allclose(found, (hidden @ wo + bo) / 2, rtol=1e-4, atol=1e-5)


def test_noise_is_gumbels_and_one_for_all_tokens_of_a_group():
  score, t = task_mlp(start=1.), jnp.zeros((4000, 2, 5))
  noise = np.asarray(score(t, key=jax.random.key(0), train=True).logits - score(t, key=None, train=False).logits)
  np.testing.assert_array_equal(noise[:, 0], noise[:, 1])
  # Mean Euler's gamma and variance pi^2/6; 16,000 draws: five standard errors are 0.05, and 0.13 of the variance.
  assert noise[:, 0].mean() == pytest.approx(np.euler_gamma, abs=0.05)
  assert noise[:, 0].var() == pytest.approx(np.pi**2 / 6, abs=0.13)


@pytest.mark.parametrize('step, expected', [
    (0, 2.), (1000, 2 * math.exp(-0.3)), (9985, 0.10003), (9987, 0.1), (10**6, 0.1)])
def test_the_temperature_falls_exponentially_to_its_end(step, expected):
  # 2 exp(-3e-4 t) reaches 0.1 at t = ln(20) / 3e-4 = 9985.8.
  assert float(temperature(jnp.int32(step), 2., 3e-4, .1)) == pytest.approx(expected, rel=2e-4)


def test_training_counts_the_steps_that_cool_it():
  fragment = papers.cross_task(num_tasks=3, start=2., decay=0.5)
  first, state = routed(fragment)
  second, _ = routed(fragment, state=functional.merge_updates(state, first.updates))
  assert int(first.updates['score']['step']) == 1 and int(second.updates['score']['step']) == 2
  cold, warm = (routed(fragment, train=False, state=given)[0].probs for given in (
      functional.merge_updates(state, first.updates), state))
  # Logits over a temperature that is exp(-1/2) times as high.
  logit = lambda p: np.log(np.asarray(p[0, 0], np.float64)) - np.log(np.asarray(p[0, 0, :1], np.float64))
  np.testing.assert_allclose(logit(cold), logit(warm) * math.exp(0.5), rtol=1e-3, atol=1e-4)


def test_at_a_high_temperature_routing_is_the_average_of_the_experts():
  out, _ = routed(papers.cross_task(num_tasks=3, relaxation='softmax', start=1e7, end=1.), train=False)
  expected = np.where(np.asarray(VALID)[..., None], 1 / E, 0.)
  np.testing.assert_allclose(out.plan.weight, np.broadcast_to(expected, (G, S, E)), atol=1e-6)


def test_at_a_low_temperature_routing_is_a_single_path():
  out, _ = routed(papers.cross_task(num_tasks=3, relaxation='softmax', start=1e-4, end=1e-4), train=False)
  weight = np.asarray(out.plan.weight)[np.asarray(VALID)]
  np.testing.assert_allclose(np.sort(weight, -1), np.tile([0., 0., 0., 1.], (len(weight), 1)), atol=1e-6)


def test_straight_through_is_a_one_hot_with_the_gradient_of_the_softmax():
  logits, towards = jax.random.normal(jax.random.key(5), (2, 7, E))
  value, gradient = jax.value_and_grad(lambda logits: (straight_through(logits) * towards).sum())(logits)
  best = np.asarray(logits).argmax(-1)
  assert float(value) == pytest.approx(float(np.asarray(towards)[np.arange(7), best].sum()), rel=1e-6)
  p = special.softmax(np.asarray(logits, np.float64), -1)
  expected = p * (towards - (p * towards).sum(-1, keepdims=True))
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_all_tokens_of_a_task_take_one_path():
  for train in (True, False):
    weight = np.asarray(routed(papers.cross_task(num_tasks=3), train=train)[0].plan.weight)[0]
    for tokens in (slice(0, 3), slice(3, 8), slice(8, 10)):
      assert (weight[tokens] == weight[tokens][0]).all() and sorted(weight[tokens][0]) == [0, 0, 0, 1]
