"""Noisy top-k gating: its probabilities against draws, its losses against a case worked out by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import routing_reference as reference
from moejax.config import ConfigError
from moejax.random import derive
from moejax.routing import papers, router
from moejax.routing.balance import load
from moejax.routing.balance.imbalance import imbalance
from moejax.routing.inputs import RouterInputs
from moejax.routing.score import noisy_linear
from moejax.routing.valid_tokens import over_tokens

G, S, D, E = 1, 6, 5, 4


def build(**fragment):
  module = router.build(papers.sparsely_gated(**fragment), 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
  generator = np.random.default_rng(0)
  for name in ('kernel', 'noise_kernel'):
    kernel = getattr(module.score, name)
    kernel[...] = jnp.asarray(generator.normal(size=kernel.shape), jnp.float32)
  return module


X = np.random.default_rng(1).normal(size=(G, S, D)).astype(np.float32)


def test_noise_has_the_learned_size_and_leaves_the_clean_logits_alone():
  score = build(k=2).score
  # The same token 20,000 times: the deviation of its logits is within 3% (six standard errors) of the formula.
  out = score(jnp.broadcast_to(X[:, :1], (G, 20_000, D)), key=jax.random.key(0), train=True)
  raw = X[0, 0].astype(np.float64) @ np.asarray(score.noise_kernel[...], np.float64)
  np.testing.assert_allclose(np.std(out.logits[0], axis=0), np.log1p(np.exp(raw)) + 0.01, rtol=0.03)
  np.testing.assert_allclose(out.noise_std[0, 0], np.log1p(np.exp(raw)) + 0.01, rtol=1e-5)
  np.testing.assert_allclose(out.clean[0, 0], X[0, 0] @ np.asarray(score.kernel[...]), rtol=1e-5, atol=1e-6)


def test_kernels_start_at_zero_so_that_all_experts_are_equally_likely():
  module = router.build(papers.sparsely_gated(k=2), 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
  out = reference.run(module.score, X, key=jax.random.key(0), train=True)
  np.testing.assert_array_equal(out.clean, 0)
  np.testing.assert_allclose(out.noise_std, np.log(2) + 0.01, rtol=1e-6)


def test_prob_in_top_k_is_the_frequency_of_being_chosen_when_one_noise_is_drawn_again():
  generator, k, draws = np.random.default_rng(2), 2, 20_000
  clean, std = generator.normal(size=(S, E)), np.log1p(np.exp(generator.normal(size=(S, E))))
  logits = clean + std * generator.normal(size=(S, E))
  prob = jax.jit(load.prob_in_top_k, static_argnums=3)(*(jnp.asarray(a, jnp.float32) for a in (logits, clean, std)), k)
  frequency = np.empty((S, E))
  for token, expert in np.ndindex(S, E):
    others = np.sort(np.delete(logits[token], expert))[::-1]
    again = clean[token, expert] + std[token, expert] * generator.normal(size=draws)
    frequency[token, expert] = (again > others[k - 1]).mean()  # at most k - 1 of the others are larger
  # The standard error of a frequency is at most 0.5 / sqrt(20,000) = 0.0035; 24 of them stay below four.
  np.testing.assert_allclose(prob, frequency, atol=0.0142)


def test_losses_of_a_case_worked_out_by_hand():
  """Two tokens, three experts, k = 1; noise_std 1 everywhere, clean logits 0.

      noisy logits    chosen   largest other    P = Phi(0 - largest other)
      [2, 1, 0]       0        [1, 2, 2]        [.158655, .022750, .022750]
      [0, 3, 1]       1        [3, 1, 3]        [.001350, .158655, .001350]

  Load [.160005, .181405, .024100]: mean .121837, variance ((.038168)^2 + (.059568)^2 + (.097737)^2) / 3 = .00485251,
  CV^2 = .00485251 / .0148442 = .326896. Importance: weights are 1 for what is chosen: [1, 1, 0]: mean 2/3, variance
  2/9, CV^2 = 1/2.
  """
  logits, valid = jnp.asarray([[[2., 1, 0], [0, 3, 1]]]), jnp.ones((1, 2), bool)
  prob = load.prob_in_top_k(logits, jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)), 1)
  np.testing.assert_allclose(prob[0], [[.158655, .022750, .022750], [.001350, .158655, .001350]], atol=1e-6)
  assert float(imbalance(over_tokens(prob, valid), valid)) == pytest.approx(.326896, abs=2e-5)
  weight = jnp.asarray([[[1., 0, 0], [0, 1, 0]]])
  assert float(imbalance(over_tokens(weight, valid), valid)) == pytest.approx(.5, abs=1e-6)


def test_weights_and_losses_equal_a_loop_over_tokens_in_float64():
  module, key, k = build(k=2), jax.random.key(3), 2
  out = reference.run(module, X, RouterInputs(), key=key, train=True)
  scores = reference.run(module.score, X, key=derive(key, 'score'), train=True)  # what the router drew
  logits, clean, std = (np.asarray(a, np.float64)[0] for a in (scores.logits, scores.clean, scores.noise_std))
  weight, load = np.zeros((S, E)), np.zeros(E)
  for token in range(S):
    best = sorted(range(E), key=lambda e: -logits[token, e])
    weight[token, best[:k]] = reference.softmax(logits[token, best[:k]])
    for e in range(E):
      threshold = logits[token, best[k] if e in best[:k] else best[k - 1]]
      load[e] += stats.norm.cdf((clean[token, e] - threshold) / std[token, e])
  np.testing.assert_allclose(out.plan.to_dense().weight[0], weight, atol=1e-6)
  variation = lambda amounts: amounts.var() / amounts.mean()**2
  # float32 sums and a float32 error function.
  assert float(out.losses['gate_importance']) == pytest.approx(0.1 * variation(weight.sum(0)), rel=1e-4)
  assert float(out.losses['smooth_load']) == pytest.approx(0.1 * variation(load), rel=1e-4)


def test_without_noise_and_with_all_experts_it_is_a_dense_mixture():
  module = build(k=E)
  out = reference.run(module, X, RouterInputs(), train=False)
  logits = X[0].astype(np.float64) @ np.asarray(module.score.kernel[...], np.float64)
  np.testing.assert_allclose(out.plan.to_dense().weight[0], reference.softmax(logits), atol=1e-6)
  assert float(out.metrics['smooth_load_loss']) == 0  # every expert is chosen by every token


def test_without_noise_the_load_is_counted():
  module = build(k=2)
  out = reference.run(module, X, RouterInputs(), train=False)
  counts = np.bincount(np.asarray(out.plan.expert).ravel(), minlength=E)
  assert float(out.metrics['smooth_load_loss']) == pytest.approx(counts.var() / counts.mean()**2, rel=1e-6)


def test_the_load_loss_moves_noise_and_logits_of_an_expert_that_is_not_chosen():
  gradients = jax.jit(jax.grad(lambda clean, std: imbalance(over_tokens(load.prob_in_top_k(
      jnp.asarray([[[2., 1, 0]]]), clean, std, 1), jnp.ones((1, 1), bool)), jnp.ones((1, 1), bool)), argnums=(0, 1)))(
          jnp.zeros((1, 1, 3)), jnp.ones((1, 1, 3)))
  # dP/dclean = phi(2) and dP/dstd = 2 phi(2) for the third, whose threshold is 2; CV^2 falls as its load grows.
  clean, std = (np.asarray(g)[0, 0, 2] for g in gradients)
  assert clean < 0 and std / clean == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize('changes, message', [
    (dict(score=dict(name='linear')), 'without noise the load loss has no gradient'),
    (dict(select=dict(name='all'), weigh=dict(name='softmax')), 'requires token choice'),
])
def test_a_load_loss_needs_noise_and_choices(changes, message):
  with pytest.raises(ConfigError, match=message):
    router.build(papers.sparsely_gated(k=2) | changes, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))


def test_vanishing_noise_leaves_finite_gradients():
  clean = jnp.array([[[2., 1., 1.]]])
  def loss(raw, clean):
    std = noisy_linear.learned_noise_std(raw, 0.)
    return imbalance(over_tokens(load.prob_in_top_k(clean, clean, std, 1), jnp.ones((1, 1), bool)),
                           jnp.ones((1, 1), bool))
  value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.full((1, 1, 3), -120.), clean)
  assert value == pytest.approx(2)  # the load is 1, 0, 0: of mean 1/3 and variance 2/9
  assert all(np.isfinite(leaf).all() for leaf in gradients)
