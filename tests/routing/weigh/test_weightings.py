"""Weights by hand: probabilities .6, .3, .1, of which two experts are selected and one is dropped."""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import DensePlan, SlotPlan, SoftPlan, TokenPlan
from moejax.routing.stages import WEIGHTINGS
import routing_reference as reference

LOGITS = jnp.log(jnp.array([[[.6, .3, .1]]]))
SIGMOIDS = [.6 / 1.6, .3 / 1.3]  # sigmoid(log p) = p / (1 + p)
FIRST_TWO = TokenPlan(expert=jnp.array([[[0, 1]]]), weight=jnp.ones((1, 1, 2)), kept=jnp.ones((1, 1, 2), bool),
                      num_experts=3)


def build(k=2, **config):
  return WEIGHTINGS.build(config, 'config.weigh', k=k)


def build_router(config, num_experts=4):
  return router.build(config, 'config.router', dim=6, num_experts=num_experts, rngs=nnx.Rngs(0))


def weights(config, kept=(True, True)):
  weigh = build(**config)
  plan = weigh.weigh(FIRST_TWO, LOGITS)
  return weigh.after_drops(dataclasses.replace(plan, kept=jnp.array([[kept]])), LOGITS).kept_weight[0, 0]


@pytest.mark.parametrize('config, both, survivor', [
    (dict(name='softmax', order='before', renormalize='never'), [.6, .3], .6),             # p
    (dict(name='softmax', order='before', renormalize='before'), [2 / 3, 1 / 3], 2 / 3),   # p / (p1 + p2)
    (dict(name='softmax', order='before', renormalize='after'), [2 / 3, 1 / 3], 1.),       # 1
    (dict(name='softmax', order='after', renormalize='never'), [2 / 3, 1 / 3], 2 / 3),
    (dict(name='softmax', order='after', renormalize='before'), [2 / 3, 1 / 3], 2 / 3),
    (dict(name='softmax', order='after', renormalize='after'), [2 / 3, 1 / 3], 1.),
    (dict(name='sigmoid', renormalize='never'), SIGMOIDS, SIGMOIDS[0]),
    (dict(name='sigmoid', renormalize='before'), np.divide(SIGMOIDS, sum(SIGMOIDS)), SIGMOIDS[0] / sum(SIGMOIDS)),
    (dict(name='sigmoid', renormalize='after'), np.divide(SIGMOIDS, sum(SIGMOIDS)), 1.),
    (dict(name='one'), [1., 1.], 1.),
])
def test_the_survivor_of_two_experts_has_the_weight_of_its_convention(config, both, survivor):
  # A handful of float32 roundings of numbers below 1.
  np.testing.assert_allclose(weights(config), both, rtol=0, atol=1e-6)
  np.testing.assert_allclose(weights(config, kept=(True, False)), [survivor, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('config', [dict(name='softmax', renormalize='after'), dict(name='softmax'), dict(name='one'),
                                    dict(name='sigmoid', renormalize='after')])
def test_a_token_that_lost_all_its_experts_gets_nothing_and_no_gradient(config):
  weigh = build(**config)
  def total(logits):
    plan = dataclasses.replace(weigh.weigh(FIRST_TWO, logits), kept=jnp.zeros((1, 1, 2), bool))
    return weigh.after_drops(plan, logits).kept_weight.sum()
  value, gradient = jax.value_and_grad(total)(LOGITS)
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros((1, 1, 3)))


def test_softmax_after_selection_is_softmax_before_it_renormalized():
  logits = 5 * jax.random.normal(jax.random.key(0), (2, 7, 3))
  expert = jnp.argsort(-logits, axis=-1)[..., :2]
  plan = TokenPlan(expert=expert, weight=jnp.ones(expert.shape), kept=jnp.ones(expert.shape, bool), num_experts=3)
  after, before = (build(name='softmax', **config).weigh(plan, logits).weight
                   for config in (dict(order='after'), dict(renormalize='before')))
  # Two float32 softmaxes and a quotient.
  np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)


def test_softmax_after_selection_does_not_underflow():
  plan = dataclasses.replace(FIRST_TWO, expert=jnp.array([[[1, 2]]]))
  weight = build(name='softmax', order='after').weigh(plan, jnp.array([[[500., 1., 1.]]])).weight
  np.testing.assert_array_equal(weight, [[[.5, .5]]])


def test_one_gives_the_router_no_gradient():
  gradient = jax.grad(lambda logits: build(name='one').weigh(FIRST_TWO, logits).weight.sum())(LOGITS)
  np.testing.assert_array_equal(gradient, np.zeros((1, 1, 3)))


def test_expert_choice_weights_are_the_probabilities_of_the_tokens_taken():
  logits = jnp.log(jnp.array([[[.6, .4], [.2, .8]]]))
  plan = SlotPlan(token=jnp.array([[[0], [1]]]), weight=jnp.ones((1, 2, 1)), filled=jnp.ones((1, 2, 1), bool),
                  num_tokens=2)
  np.testing.assert_allclose(build(k=None, name='softmax').weigh(plan, logits).weight, [[[.6], [.8]]], rtol=1e-6)


def test_dense_weights_are_the_whole_softmax():
  plan = build(k=None, name='softmax').weigh(DensePlan(jnp.ones((1, 1, 3))), LOGITS)
  np.testing.assert_allclose(plan.weight, [[[.6, .3, .1]]], rtol=1e-6)


def test_soft_moe_combine_weights_are_a_softmax_over_all_slots_of_all_experts():
  logits = jax.random.normal(jax.random.key(0), (2, 5, 3, 2))
  plan = SoftPlan(dispatch=jnp.ones(logits.shape), combine=jnp.ones(logits.shape))
  combine = build(k=None, name='softmax').weigh(plan, logits).combine
  expected = reference.softmax(np.asarray(logits).reshape(2, 5, 6)).reshape(logits.shape)
  np.testing.assert_allclose(combine, expected, rtol=2e-6)
  np.testing.assert_allclose(combine.sum((2, 3)), 1, rtol=1e-6)


@pytest.mark.parametrize('config', [dict(name='softmax', renormalize='before'), dict(name='softmax', order='after'),
                                    dict(name='sigmoid', renormalize='after')])
def test_weights_over_the_selected_need_tokens_that_select(config):
  with pytest.raises(ConfigError, match=r'config\.weigh\.(renormalize|order)=.* requires token choice with a fixed number'):
    build(k=None, **config)


def test_an_unknown_order_names_the_ones_there_are():
  with pytest.raises(ConfigError, match="config.weigh.order must be one of 'before', 'after'"):
    build(name='softmax', order='first')


FIRST_TWO_OF_FOUR = TokenPlan(expert=jnp.array([[[0, 1]]]), weight=jnp.ones((1, 1, 2)),
                              kept=jnp.ones((1, 1, 2), bool), num_experts=4)


def sigmoid_shares(logits, members):
  """In float64: the shares of sigmoids among `members`, and the Jacobian of the shares by the logits."""
  logits = np.asarray(logits, np.float64)
  gates = np.where(members, 1 / (1 + np.exp(-logits)), 0)
  shares = gates / gates.sum()
  slopes = 1 - 1 / (1 + np.exp(-logits))  # of the logarithms of the gates
  return shares, (np.diag(shares) - np.outer(shares, shares)) * slopes


@pytest.mark.parametrize('renormalize', ['before', 'after'])
@pytest.mark.parametrize('logits', [[.3, -.2, 1., 0.], [-50., -50., -50., -50.], [-50., -49., -48., -90.],
                                    [-120., -121., -300., 2.], [40., 41., 0., 0.]])
def test_shares_of_tiny_sigmoids_and_their_slopes_equal_float64(renormalize, logits):
  weigh = build(name='sigmoid', renormalize=renormalize)
  def weights(logits):
    plan = weigh.weigh(FIRST_TWO_OF_FOUR, logits[None, None])
    return weigh.after_drops(plan, logits[None, None]).kept_weight[0, 0]
  shares, jacobian = sigmoid_shares(logits, [True, True, False, False])
  np.testing.assert_allclose(weights(jnp.array(logits)), shares[:2], rtol=1e-6)
  np.testing.assert_allclose(jax.jacobian(weights)(jnp.array(logits)), jacobian[:2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('logits', [[.3, -.2, 1., 0.], [-50., -50., -50., -50.], [-120., -121., -300., -119.]])
def test_router_probabilities_of_tiny_sigmoids_and_their_slopes_equal_float64(logits):
  probs = lambda logits: build(name='sigmoid').probs(logits[None, None])[0, 0]
  shares, jacobian = sigmoid_shares(logits, [True] * 4)
  np.testing.assert_allclose(probs(jnp.array(logits)), shares, rtol=1e-6, atol=1e-30)
  np.testing.assert_allclose(jax.jacobian(probs)(jnp.array(logits)), jacobian, rtol=1e-5, atol=1e-7)


def test_the_survivor_of_two_has_all_the_weight_however_small_its_probability_was():
  weigh = build(name='softmax', renormalize='after')
  def weight(logits):
    plan = dataclasses.replace(weigh.weigh(FIRST_TWO_OF_FOUR, logits), kept=jnp.array([[[False, True]]]))
    return weigh.after_drops(plan, logits).kept_weight[0, 0]
  logits = jnp.array([[[0., -45., -60., -60.]]])
  for given in (logits, 3 * logits):
    np.testing.assert_array_equal(weight(given), [0., 1.])
    np.testing.assert_array_equal(jax.jacobian(weight)(given), np.zeros((2, 1, 1, 4)))


ONE_CHOICE = dict(score=dict(name='linear'), select=dict(name='top_k', k=1))


@pytest.mark.parametrize('config', [
    papers.top_k_dropless(k=1),
    papers.lucidrains(n=1),
    papers.hierarchical(groups=2, groups_per_token=1, per_group=1),
    ONE_CHOICE | dict(weigh=dict(name='softmax', renormalize='after')),
    ONE_CHOICE | dict(weigh=dict(name='sigmoid', renormalize='before')),
    papers.s_base() | dict(weigh=dict(name='softmax', order='after')),
    papers.switch(overflow='retry') | dict(weigh=dict(name='softmax', renormalize='before')),
], ids=['mixtral', 'lucidrains', 'hierarchical', 'after drops', 'sigmoid', 'together', 'retry'])
def test_a_router_whose_weights_cannot_depend_on_it_is_refused(config):
  with pytest.raises(ConfigError, match=r'config\.router\.weigh: with one expert per token, .* gives the router no gradient'):
    build_router(config)


@pytest.mark.parametrize('config', [
    papers.switch(), papers.loss_free(k=1), papers.base(), papers.s_base(), papers.xmoe(), papers.rl_routing(),
    papers.rl_routing(weight='one'), papers.thor(), papers.demix(num_domains=3), papers.hash_layers(vocab_size=9),
    papers.deepspeed(), papers.gmoe(), papers.fastmoe(gate='zero'),
    papers.hash_layers(vocab_size=9) | dict(weigh=dict(name='softmax', order='after')),  # with nothing to learn
])
def test_routers_with_one_expert_that_learn_or_are_not_to_are_built(config):
  build_router(config)


def test_with_one_expert_in_all_there_is_nothing_to_learn():
  build_router(papers.top_k_dropless(k=1), num_experts=1)


@pytest.mark.parametrize('name', sorted(set(WEIGHTINGS) - {'hierarchical'}))
def test_every_weighting_weighs_slots_too(name):
  """Soft MoE scores [G,S,E,C]; probabilities are of experts, and sum to 1 where they are a softmax."""
  module = build_router(papers.soft_moe(slots=3) | dict(weigh=dict(name=name)))
  out = jax.eval_shape(lambda x: module(x, RouterInputs()), jax.ShapeDtypeStruct((2, 5, 6), jnp.float32))
  assert out.plan.combine.shape == (2, 5, 4, 3) and out.probs.shape == (2, 5, 4)


def test_takers_share_one_softmax_over_all_their_slots():
  logits = jnp.arange(12.).reshape(1, 2, 3, 2)
  plan = SoftPlan(dispatch=jnp.ones((1, 2, 3, 2)) / 2, combine=jnp.ones((1, 2, 3, 2)))
  weighed = WEIGHTINGS.build(dict(name='softmax_over_takers'), 'config.weigh', k=None).weigh(plan, logits)
  exponentials = np.exp(np.arange(12.).reshape(2, 6) % 6)
  np.testing.assert_allclose(weighed.combine.reshape(2, 6), exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-6)
