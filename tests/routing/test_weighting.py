"""Weights by hand: probabilities .6, .3, .1, of which two experts are selected and one is dropped."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing import weighting
from moejax.routing.plans import DensePlan, SlotPlan, SoftPlan, TokenPlan
from moejax.routing.weighting import WEIGHTINGS
import routing_reference as reference

LOGITS = jnp.log(jnp.array([[[.6, .3, .1]]]))
SIGMOIDS = [.6 / 1.6, .3 / 1.3]  # sigmoid(log p) = p / (1 + p)
FIRST_TWO = TokenPlan(expert=jnp.array([[[0, 1]]]), weight=jnp.ones((1, 1, 2)), kept=jnp.ones((1, 1, 2), bool),
                      num_experts=3)


def build(k=2, **config):
  return WEIGHTINGS.build(config, 'config.weigh', k=k)


def weights(config, kept=(True, True)):
  weigh = build(**config)
  plan = weigh.weigh(FIRST_TWO, LOGITS)
  return weigh.after_drops(dataclasses.replace(plan, kept=jnp.array([[kept]]))).kept_weight[0, 0]


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
    return weigh.after_drops(plan).kept_weight.sum()
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


def test_router_probabilities_are_gates_over_their_sum_with_slots_added_up():
  np.testing.assert_allclose(weighting.router_probs(jnp.array([[[.2, .6]]])), [[[.25, .75]]], rtol=1e-6)
  np.testing.assert_allclose(weighting.router_probs(jnp.array([[[[.1, .2], [.3, .4]]]])), [[[.3, .7]]], rtol=1e-6)


@pytest.mark.parametrize('config', [dict(name='softmax', renormalize='before'), dict(name='softmax', order='after'),
                                    dict(name='sigmoid', renormalize='after')])
def test_weights_over_the_selected_need_tokens_that_select(config):
  with pytest.raises(ConfigError, match=r'config\.weigh\.(renormalize|order) is .* no fixed number of experts'):
    build(k=None, **config)


def test_an_unknown_order_names_the_ones_there_are():
  with pytest.raises(ConfigError, match="config.weigh.order must be one of 'before', 'after'"):
    build(name='softmax', order='first')
