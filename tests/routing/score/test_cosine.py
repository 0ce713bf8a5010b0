"""Cosine routers against float64 loops over tokens that are written from the equations, and their invariances.

Three forms: X-MoE (2204.09179, equations 5 to 8), its release in torchscale, and Tutel's `cosine_top`, which is GMoE's
(2206.04046).
"""
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.gmoe import tutel_loss
from moejax.routing.papers.xmoe import fixed_temperature_loss
from moejax.routing.score import cosine
from moejax.routing.stages import SCORES
import routing_reference as reference

G, S, D, P, E = 2, 7, 8, 3, 4
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (G, S, D))
VALID = jnp.ones((G, S), bool).at[1, 4:].set(False)
# float32 products of eight numbers of order one, times scales of some tens.
CLOSE = dict(rtol=0, atol=1e-4)


def build(dim=D, **config):
  return SCORES.build(dict(name='cosine') | config, 'config.score', dim=dim, num_experts=E, rngs=nnx.Rngs(0))


def routed(fragment):
  """The paper's router with parameters of order one, and those in float64."""
  module = router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
  score, rng = module.score, np.random.RandomState(0)
  for name in ('kernel', 'bias', 'experts'):
    if getattr(score, name) is not None:
      getattr(score, name)[...] = jnp.float32(rng.normal(size=getattr(score, name).shape))
  wide = lambda variable: None if variable is None else np.asarray(variable[...], np.float64)
  return module, {name: wide(getattr(score, name)) for name in ('kernel', 'bias', 'experts', 'temperature')}


def softmax(logits):
  return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def length(v):
  return math.sqrt(sum(value * value for value in v))


def test_xmoe_is_the_loop_over_tokens_of_its_equations():
  module, p = routed(papers.xmoe(dim=P))
  out = jax.jit(lambda x: module(x, RouterInputs(valid=VALID), train=True))(X)
  assert p['temperature'] == pytest.approx(0.07)
  losses = []
  for g in range(G):
    share, mean = np.zeros(E), np.zeros(E)
    tokens = [s for s in range(S) if VALID[g, s]]
    for s in tokens:
      projected = np.asarray(X[g, s], np.float64) @ p['kernel']
      similar = np.array([projected @ e / length(projected) / length(e) for e in p['experts']])
      best = int(np.argmax(similar))
      assert out.plan.expert[g, s, 0] == best
      alpha = 1 / (1 + math.exp(-similar[best] / 0.07))
      np.testing.assert_allclose(out.plan.weight[g, s, 0], alpha, **CLOSE)
      share[best] += 1 / len(tokens)
      mean += softmax(similar / 0.07) / len(tokens)
    losses.append(E * float((share + 1e-6) @ mean))
  np.testing.assert_allclose(out.metrics['fixed_temperature_loss'], np.mean(losses), rtol=1e-5)


def test_xmoe_balances_at_a_fixed_temperature():
  module, _ = routed(papers.xmoe(dim=P))
  before = reference.run(module, X, RouterInputs(), train=True)
  module.score.temperature[...] = jnp.float32(0.5)
  after = reference.run(module, X, RouterInputs(), train=True)
  assert before.metrics['fixed_temperature_loss'] == after.metrics['fixed_temperature_loss']
  np.testing.assert_array_equal(before.plan.expert, after.plan.expert)
  assert abs(before.plan.weight - after.plan.weight).max() > 0.05


def test_the_fixed_temperature_loss_is_1_at_uniform_routing_and_e_at_collapse():
  # Uniform cosines: P_e = 1/E whatever F; plus E 1e-6. All tokens certain of one expert: E (1 + 1e-6).
  expert = jnp.arange(8).reshape(1, 8, 1) % E
  loss = lambda cosine, expert: float(fixed_temperature_loss(cosine, expert, expert >= 0, jnp.ones((1, 8), bool), 0.07))
  assert loss(jnp.zeros((1, 8, E)), expert) == pytest.approx(1 + 1e-6 * E, abs=1e-7)
  certain = jnp.zeros((1, 8, E)).at[..., 0].set(100.)
  assert loss(certain, jnp.zeros_like(expert)) == pytest.approx(E, rel=1e-5)


def test_torchscale_divides_by_the_length_of_experts_alone():
  module, p = routed(papers.xmoe(form='torchscale', dim=P))
  assert p['temperature'] is None
  out = reference.run(module, X, RouterInputs(), train=True)
  for g, s in np.ndindex(G, S):
    projected = np.asarray(X[g, s], np.float64) @ p['kernel']
    probs = softmax(np.array([projected @ e / length(e) for e in p['experts']]))
    assert out.plan.expert[g, s, 0] == np.argmax(probs)
    np.testing.assert_allclose(out.plan.weight[g, s, 0], probs.max(), **CLOSE)


def test_rescaled_rows_have_the_gradient_that_they_would_have_if_stored_so():
  rows = jax.random.normal(KEY, (E, P))
  function = lambda rows: jnp.sin(cosine.unit(rows, 1e-12) @ jnp.ones((P, 2))).sum() + jnp.square(rows).sum()
  used = cosine.rescaled(rows, 1.5)
  np.testing.assert_allclose(np.linalg.norm(used, axis=1), 1.5, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(lambda rows: function(cosine.rescaled(rows, 1.5)))(rows),
                             jax.grad(function)(used), rtol=1e-6)


def test_gmoe_is_tutel_s_router_token_by_token():
  module, p = routed(papers.gmoe(dim=P))
  assert math.exp(p['temperature']) == pytest.approx(2)  # 1 / init_t
  out = reference.run(module, X, RouterInputs())
  for g, s in np.ndindex(G, S):
    projected = np.asarray(X[g, s], np.float64) @ p['kernel'] + p['bias']
    probs = softmax(np.array([2 * projected @ e / length(projected) / length(e) for e in p['experts']]))
    assert out.plan.expert[g, s, 0] == np.argmax(probs)
    np.testing.assert_allclose(out.plan.weight[g, s, 0], probs.max(), **CLOSE)
  assert out.plan.capacity == int(1.5 * math.ceil(S / E))


def test_tutel_s_losses_are_a_loop_over_tokens_and_experts():
  clean = np.random.RandomState(0).normal(size=(S, E))
  noisy = clean + np.random.RandomState(1).normal(size=(S, E)) / E
  for k in (1, 2):
    importance, load = np.zeros(E), np.zeros(E)
    for s in range(S):
      threshold = sorted(noisy[s])[-k]
      for e, prob in enumerate(softmax(clean[s])):
        importance[e] += prob
        load[e] += scipy.stats.norm(0, 1 / E).cdf(prob - threshold)
    squared_variation = lambda v: np.var(v, ddof=1) / np.mean(v)**2
    expected = (squared_variation(importance) + squared_variation(load)) / 2
    found = tutel_loss(jnp.float32(noisy)[None], jnp.float32(clean)[None], k, jnp.ones((1, S), bool))
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('temperature, value, scale', [
    ('divide', 0.07, 1 / 0.07), ('divide', 1e-6, 1e4), ('divide', -1., 1e4), ('none', None, 1.),
    ('exponential', math.log(2), 2.), ('exponential', math.log(100), 100.), ('exponential', 9., 100.)])
def test_temperatures_are_clamped(temperature, value, scale):
  score = build(project=P, temperature=temperature)
  if value is not None:
    score.temperature[...] = jnp.float32(value)
  assert float(score.scale()) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize('form', [papers.xmoe(dim=P), papers.gmoe(dim=P)], ids=['xmoe', 'gmoe'])
def test_routing_does_not_depend_on_the_lengths_of_tokens_and_experts(form):
  module, _ = routed(form | dict(place=dict(name='dropless')))
  if module.score.bias is not None:  # a bias is what makes the length of a token matter
    module.score.bias[...] = jnp.zeros(P)
  before = reference.run(module, X, RouterInputs()).plan
  module.score.experts[...] = module.score.experts[...] * jnp.float32([[3.], [0.1], [7.], [1.]])
  after = reference.run(module, 20 * X, RouterInputs()).plan
  np.testing.assert_array_equal(before.expert, after.expert)
  np.testing.assert_allclose(before.weight, after.weight, **CLOSE)


def test_without_norms_projection_and_temperature_it_is_a_linear_router():
  score, linear = build(normalize='none'), SCORES.build(
      dict(name='linear'), 'config.score', dim=D, num_experts=E, rngs=nnx.Rngs(1))
  linear.kernel[...] = score.experts[...].T
  np.testing.assert_allclose(score(X, key=None, train=True).logits, linear(X, key=None, train=True).logits, **CLOSE)
  # A projection to as many dimensions changes nothing where it is the identity.
  projected = build(normalize='none', project=D)
  projected.kernel[...], projected.experts[...] = jnp.eye(D), score.experts[...]
  np.testing.assert_allclose(projected(X, key=None, train=True).logits, score(X, key=None, train=True).logits, **CLOSE)


def test_the_gate_pulls_tokens_in_no_more_directions_than_the_projection_has():
  """X-MoE, section 3: with E experts in D dimensions a linear gate's gradients span min(E, D) directions."""
  def directions(score):
    score.experts[...] = jax.random.normal(KEY, score.experts.shape)
    jacobian = jax.jacobian(lambda x: score(x, key=None, train=True).logits[0, 0])(X[:1, :1])
    return np.linalg.matrix_rank(jacobian.reshape(E, D), tol=1e-4)
  assert directions(build(normalize='none')) == E
  assert directions(build(normalize='none', project=2)) == 2


def test_a_token_of_length_zero_has_finite_gradients():
  score = build(project=P)
  assert np.isfinite(jax.grad(lambda x: score(x, key=None, train=True).logits.sum())(jnp.zeros((1, 1, D)))).all()


def test_parameters_start_as_published():
  wide = SCORES.build(dict(name='cosine', project=64, project_bias=True), 'c', dim=256, num_experts=8, rngs=nnx.Rngs(0))
  # E < d_e: orthogonal rows of length 0.1; torch's Linear is uniform within 1/sqrt(256).
  np.testing.assert_allclose(wide.experts[...] @ wide.experts[...].T, 0.01 * np.eye(8), rtol=0, atol=1e-6)
  for leaf in (wide.kernel[...], wide.bias[...]):
    assert 0.9 / 16 < abs(leaf).max() <= 1 / 16 and abs(float(leaf.mean())) < 0.02
  tutel = build(project=256, init='normal', init_scale=0.01)
  assert float(tutel.experts[...].std()) == pytest.approx(0.01, rel=0.1)  # 1024 draws: four standard errors


@pytest.mark.parametrize('config, message', [
    (dict(project_bias=True), 'config.score.project_bias: there is no projection'),
    (dict(temperature='divide', temperature_init=0.), 'config.score.temperature_init must be a float above 0'),
    (dict(dim=None), 'config.score: needs vectors'),
])
def test_what_cannot_be_built_says_where_and_why(config, message):
  with pytest.raises(ConfigError, match=message):
    build(**config)


def test_the_fixed_temperature_loss_needs_cosines():
  fragment = papers.switch() | dict(balance=dict(fixed_temperature=0.01))
  with pytest.raises(ConfigError, match="config.router.balance.fixed_temperature needs 'cosine' .* that can: 'cosine'"):
    router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
