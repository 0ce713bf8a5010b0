"""Training methods: two consistent passes (THOR) at their limits; REINFORCE against the gradient of
the expected reward, which a problem of a few draws lets us enumerate."""
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from drawn_parameters import draw_parameters
from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.models.output import ModelOutput
from moejax.routing import papers
from moejax.routing.plans import TokenPlan
from moejax.routing.router import RouterOutput
from moejax.training import methods, objectives

OBJECTIVE = objectives.LanguageModel()
V = 13


def build(**config):
  return methods.METHODS.build(config, 'config.method')


def batch(rows=3, length=6):
  tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, V)
  mask = jnp.ones((rows, length)).at[1, 4:].set(0.)
  return dict(tokens=tokens, targets=jnp.roll(tokens, -1, axis=1), segments=mask.astype(jnp.int32), loss_mask=mask)


# ---- consistency ----------------------------------------------------------------------------------------------------


@functools.cache
def thor_decoder(num_experts, router='thor', dropout=0.):
  """A decoder with one layer of random experts, as compiled functions of (params, key)."""
  fragment = papers.thor() if router == 'thor' else papers.switch()
  moe = dict(num_experts=num_experts, experts=dict(name='feed_forward', hidden=8, dropout=dropout), router=fragment,
             dispatch=dict(name='gather' if router == 'switch' else 'grouped'), group='sequence')
  model = models.build(dict(name='decoder', vocab_size=V, dim=8, num_layers=1, attention=dict(heads=2),
                            feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), moe=moe))
  params, state = draw_parameters(model)

  def forward(params):
    return lambda key, batch: model.apply(params, state, batch, key=key, train=True)

  @jax.jit
  def consistent(params, key):
    def loss(params):
      value, metrics, output = build(name='consistency', alpha=2.)(forward(params), OBJECTIVE, batch(), key)
      return value, (metrics, output)
    return jax.value_and_grad(loss, has_aux=True)(params)

  passes = []  # of the last call, in order: which expert each pass drew

  def drawn(key):
    passes.clear()
    def record(key, batch):
      passes.append(forward(params)(key, batch))
      return passes[-1]
    build(name='consistency')(record, OBJECTIVE, batch(), key)
    return [output.routers['block_00'] for output in passes]

  return params, consistent, drawn, jax.jit(lambda key: forward(params)(key, batch()))


def test_the_divergence_is_the_mean_of_both_kullback_leibler_divergences():
  one, other = np.random.default_rng(0).normal(size=(2, 4, 5, V))
  p, q = (special.softmax(logits, -1) for logits in (one, other))
  expected = (special.rel_entr(p, q) + special.rel_entr(q, p)).sum(-1) / 2
  np.testing.assert_allclose(methods.symmetric_kl(jnp.asarray(one), jnp.asarray(other)), expected, rtol=2e-5)
  np.testing.assert_array_equal(methods.symmetric_kl(one, other), methods.symmetric_kl(other, one))
  np.testing.assert_array_equal(methods.symmetric_kl(one, one), np.zeros((4, 5)))


def test_one_expert_without_dropout_gives_twice_the_objective():
  params, consistent, _, once = thor_decoder(1)
  (value, (metrics, _)), _ = consistent(params, jax.random.key(1))
  single = float(OBJECTIVE(once(jax.random.key(1)), batch())[0])
  assert float(metrics['disagreement']) == 0
  assert float(value) == pytest.approx(2 * single, rel=1e-6)
  assert float(metrics['cross_entropy']) == pytest.approx(single, rel=1e-6)


def test_passes_disagree_exactly_where_they_draw_different_experts():
  params, consistent, drawn, _ = thor_decoder(4)
  kinds = set()
  for seed in range(8):
    key = jax.random.key(seed)
    first, second = (int(router.plan.expert[0, 0, 0]) for router in drawn(key))
    (value, (metrics, _)), _ = consistent(params, key)
    assert (first == second) == (float(metrics['disagreement']) == 0)
    expected = 2 * metrics['cross_entropy'] + 2. * metrics['disagreement']  # alpha is 2 here
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    kinds.add(first == second)
  assert kinds == {True, False}


def test_dropout_alone_makes_passes_disagree():
  params, consistent, _, _ = thor_decoder(1, dropout=0.5)
  assert consistent(params, jax.random.key(0))[0][1][0]['disagreement'] > 0


def test_an_expert_that_no_pass_draws_has_no_gradient():
  params, consistent, drawn, _ = thor_decoder(4)
  for seed in range(3):
    key = jax.random.key(seed)
    used = {int(router.plan.expert[0, 0, 0]) for router in drawn(key)}
    _, gradient = consistent(params, key)
    for path, leaf in flatten(gradient).items():
      if '/experts/' in path:
        assert {expert for expert in range(4) if np.asarray(leaf[expert]).any()} == used


def test_router_losses_are_those_of_both_passes():
  params, consistent, drawn, _ = thor_decoder(4, 'switch')
  key = jax.random.key(5)
  (_, (_, output)), _ = consistent(params, key)
  expected = sum(float(router.losses['switch']) for router in drawn(key))
  assert float(OBJECTIVE.router_loss(output)) == pytest.approx(expected, rel=1e-5)


# ---- REINFORCE ------------------------------------------------------------------------------------------------------

E, S = 3, 2
TARGETS = np.array([[4, 9]])
# The model's output for each token with each expert; there is one expert per token, and no other influence.
TABLE = np.random.default_rng(1).normal(size=(E, S, V))


def fake_forward(theta, experts, value=0.):
  """A model of one router whose logits are `theta` [S,E], which drew `experts` [S]."""
  plan = TokenPlan(expert=jnp.asarray(experts)[None, :, None], weight=jnp.ones((1, S, 1)),
                   kept=jnp.ones((1, S, 1), bool), num_experts=E)
  logits = jnp.asarray(TABLE)[jnp.asarray(experts), jnp.arange(S)][None]
  router = RouterOutput(plan=plan, losses={}, metrics={}, updates={}, probs=jax.nn.softmax(theta)[None],
                        extras={'value': jnp.full((1, S), value)})
  return lambda key, batch: ModelOutput(logits.astype(jnp.float32), logits, {'block_00': router}, {})


def loss_of(config, theta, experts, value=0.):
  fake = dict(targets=jnp.asarray(TARGETS), loss_mask=jnp.ones((1, S)))
  return build(name='reinforce', **config)(fake_forward(theta, experts, value), OBJECTIVE, fake, jax.random.key(0))


@pytest.mark.parametrize('config, value', [(dict(baseline='none'), 0.), (dict(baseline='learned'), -1.7)])
def test_reinforce_is_the_gradient_of_the_expected_reward(config, value):
  theta = np.random.default_rng(2).normal(size=(S, E))
  log_probs = special.log_softmax(TABLE, -1)
  reward = np.array([[log_probs[e, s, TARGETS[0, s]] for e in range(E)] for s in range(S)])

  def expected(theta):  # over all E^2 draws of the two tokens, mean over the tokens
    policy, total = special.softmax(theta, -1), 0.
    for draw in itertools.product(range(E), repeat=S):
      probability = np.prod([policy[s, e] for s, e in enumerate(draw)])
      total += probability * np.mean([reward[s, e] for s, e in enumerate(draw)])
    return total

  step, numeric = 1e-5, np.zeros((S, E))
  for index in np.ndindex(S, E):
    bump = np.zeros((S, E))
    bump[index] = step
    numeric[index] = (expected(theta + bump) - expected(theta - bump)) / (2 * step)

  gradient = jax.jit(jax.grad(lambda theta, experts: loss_of(
      dict(coefficient=1., entropy=0., value=0., **config), theta, experts, value)[0]))
  policy, mean = special.softmax(theta, -1), np.zeros((S, E))
  for draw in itertools.product(range(E), repeat=S):
    probability = np.prod([policy[s, e] for s, e in enumerate(draw)])
    mean += probability * np.asarray(gradient(jnp.float32(theta), jnp.array(draw)))
  np.testing.assert_allclose(mean, -numeric, rtol=1e-4, atol=1e-6)  # float32 sums of nine draws


def test_the_objective_the_entropy_and_the_baseline_are_added_with_their_coefficients():
  theta, draw = jnp.array([[0., 1., 2.], [0.5, 0., 0.]]), jnp.array([2, 0])
  loss, metrics, _ = loss_of(dict(coefficient=0.3, entropy=0.2, value=0.7), theta, draw, value=-2.)
  policy = special.softmax(np.asarray(theta, np.float64), -1)
  log_probs = special.log_softmax(TABLE, -1)
  reward = np.array([log_probs[2, 0, 4], log_probs[0, 1, 9]])
  entropy = special.entr(policy).sum(-1).mean()
  surrogate = np.mean(-(reward + 2) * np.log(policy[[0, 1], [2, 0]]))
  value_loss = np.mean((reward + 2) ** 2)
  assert float(metrics['policy_entropy']) == pytest.approx(entropy, rel=1e-5)
  assert float(metrics['advantage']) == pytest.approx((reward + 2).mean(), rel=1e-5)
  expected = -reward.mean() + 0.3 * (surrogate - 0.2 * entropy) + 0.7 * value_loss
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_rewards_move_the_learned_baseline_and_nothing_else_through_it():
  def value_part(value):
    return loss_of(dict(coefficient=0., value=1.), jnp.zeros((S, E)), jnp.array([0, 1]), value)[0]
  log_probs = special.log_softmax(TABLE, -1)
  reward = np.array([log_probs[0, 0, 4], log_probs[1, 1, 9]])
  # d/dv mean (r - v)^2 = 2 (v - mean r)
  assert float(jax.grad(value_part)(-1.)) == pytest.approx(2 * (-1. - reward.mean()), rel=1e-5)


@functools.cache
def rl_decoder(router):
  moe = dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), dispatch=dict(name='grouped'), router=router())
  return models.build(dict(name='decoder', vocab_size=V, dim=8, num_layers=1, attention=dict(heads=2),
                           feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), moe=moe))


def rl_loss(method, model, params, state):
  forward = lambda key, batch: model.apply(params, state, batch, key=key, train=True)
  return method(forward, OBJECTIVE, batch(), jax.random.key(1))


def only_reinforce():
  return papers.rl_routing(weight='one', balance=0.)


def test_in_a_decoder_routers_learn_from_reinforce_alone_where_their_weight_is_one():
  model = rl_decoder(only_reinforce)
  params, state = draw_parameters(model)
  gradient = jax.jit(jax.grad(lambda params, coefficient: rl_loss(
      methods.Reinforce(coefficient=coefficient), model, params, state)[0]))
  for coefficient, moved in ((1., True), (0., False)):
    flat = flatten(gradient(params, coefficient))
    kernels, values = ([np.asarray(leaf) for path, leaf in flat.items() if path.endswith(name)]
                       for name in ('score/kernel', 'score/value'))
    assert len(kernels) == len(values) == 1
    assert kernels[0].any() == moved and values[0].any()


@pytest.mark.parametrize('router, message', [
    (papers.switch, 'the router block_00 has no learned one'),
    (lambda: papers.gshard(second='all'), 'does not draw one expert for each predicted token')])
def test_routers_that_reinforce_cannot_train_are_refused(router, message):
  fragment = {**router(), 'place': dict(name='dropless')}
  model = rl_decoder(lambda: fragment)
  params, state = model.shapes()
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(lambda params, state: rl_loss(build(name='reinforce'), model, params, state)[0], params, state)


def test_models_without_routers_are_refused():
  output = dataclasses.replace(fake_forward(jnp.zeros((S, E)), [0, 0])(None, None), routers={})
  with pytest.raises(ConfigError, match='is for language models with mixtures of experts'):
    build(name='reinforce')(lambda key, batch: output, OBJECTIVE, dict(
        targets=jnp.asarray(TARGETS), loss_mask=jnp.ones((1, S))), jax.random.key(0))


@pytest.mark.parametrize('name', ['contrastive', 'ctc'])
def test_a_method_that_weighs_examples_is_refused_where_the_objective_scores_a_batch_whole(name):
  objective = objectives.build(dict(name=name), 'config.objective')
  with pytest.raises(ConfigError, match="config.objective: .* Set config.method.name to 'plain'"):
    objective.mean(jnp.zeros(2), dict(valid=jnp.ones(2, bool)))
