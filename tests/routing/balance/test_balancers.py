"""Losses against golden vectors, hand-derived values and the analytic extremes: uniform, balanced, collapsed.

The golden vectors are from the tests of google-research/vmoe.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError
from moejax.routing import router
from moejax.routing.balance.bias import bias_step
from moejax.routing.balance.importance import importance_loss
from moejax.routing.balance.load import load_loss
from moejax.routing.balance.switch import switch_loss
from moejax.routing.balance.z import z_loss
from moejax.routing.plans import TokenPlan
from moejax.routing.stages import Routed, noiseless

CONVENTIONS = ['moejax', 'gshard', 'fairseq', 'flaxformer', 'mixtral', 'deepspeed']
GOLDEN = jnp.array([[[.5, .4, .1], [.3, .3, .4], [.1, .2, .7], [.8, .2, 0.]]])
KEY = jax.random.key(0)


def everything(array):
  return jnp.ones(array.shape[:2], bool)


def switch(probs, expert, convention, valid=None):
  expert = jnp.asarray(expert, jnp.int32)
  valid = everything(probs) if valid is None else valid
  routed = jnp.broadcast_to(valid[..., None], expert.shape)
  return float(switch_loss(probs, expert, routed, valid, convention))


def best(probs, k):
  return np.argsort(-np.asarray(probs), axis=-1, kind='stable')[..., :k]


# Mean probabilities P = (1.7, 1.1, 1.2)/4. First choices name experts 0, 2, 2, 0: F = (2, 0, 2)/4, and
# 3*(.5*.425 + .5*.3) = 1.0875. Both choices (ties to the lower index) name 0 1, 2 0, 2 1, 0 1: counts 3, 3, 2, and
# 3*(3*.425 + 3*.275 + 2*.3)/8 = 1.0125, or twice that with F summing to 2. All three: F = 1/3 each, P sums to 1: 1.
@pytest.mark.parametrize('convention, k, expected', [
    *[(convention, 1, 1.0875) for convention in CONVENTIONS],
    ('moejax', 2, 1.0125), ('gshard', 2, 1.0875), ('fairseq', 2, 1.0875), ('flaxformer', 2, 2.025),
    ('mixtral', 2, 2.025), ('deepspeed', 2, 1.0875), ('deepspeed', 3, 1.), ('flaxformer', 3, 3.),
    ('gshard', 3, 1.0875)])
def test_the_switch_loss_of_the_golden_gates(convention, k, expected):
  assert switch(GOLDEN, best(GOLDEN, k), convention) == pytest.approx(expected, abs=1e-6)


def test_the_importance_loss_of_the_golden_gates():
  # Importance (1.7, 1.1, 1.2): mean 4/3, population variance .0688889, over 16/9.
  assert float(importance_loss(jnp.log(GOLDEN), everything(GOLDEN))) == pytest.approx(0.03875, abs=1e-6)


def test_the_load_loss_of_the_golden_logits():
  clean = jnp.array([[[.9, .06, .04], [.7, .18, .12], [.85, .05, .1]]])
  noise = jnp.array([[[-.037, .026, -.018], [-.074, .045, -.015], [-.067, -.059, .073]]])
  loss = load_loss(clean + noise, clean, jnp.float32(.1), 2, everything(clean))
  assert float(loss) == pytest.approx(0.48573864, abs=1e-6)


VALUE_AT_UNIFORM = dict(moejax=lambda k: 1, gshard=lambda k: 1, fairseq=lambda k: 1, flaxformer=lambda k: k,
                        mixtral=lambda k: k, deepspeed=lambda k: 1)


@pytest.mark.parametrize('convention', CONVENTIONS)
@pytest.mark.parametrize('k', [1, 2, 3])
def test_the_switch_loss_at_uniform_routing_follows_the_convention(convention, k):
  probs = jnp.full((2, 8, 4), .25)
  expert = np.broadcast_to((np.arange(8)[:, None] + np.arange(k)) % 4, (2, 8, k))
  assert switch(probs, expert, convention) == pytest.approx(VALUE_AT_UNIFORM[convention](k), abs=1e-6)


@pytest.mark.parametrize('convention', CONVENTIONS)
def test_the_switch_loss_is_one_for_certain_balanced_routing_and_e_for_collapse(convention):
  balanced, collapsed = np.arange(8).reshape(1, 8, 1) % 4, np.zeros((1, 8, 1), int)
  assert switch(jax.nn.one_hot(balanced[..., 0], 4), balanced, convention) == pytest.approx(1)
  assert switch(jax.nn.one_hot(collapsed[..., 0], 4), collapsed, convention) == pytest.approx(4)


def test_mixtral_alone_pools_groups_so_that_opposite_groups_balance():
  probs = jax.nn.one_hot(jnp.array([[0, 0], [1, 1]]), 2)
  expert = np.array([[[0], [0]], [[1], [1]]])
  assert switch(probs, expert, 'mixtral') == pytest.approx(1)
  assert switch(probs, expert, 'moejax') == pytest.approx(2)


@pytest.mark.parametrize('convention', ['moejax', 'flaxformer'])
def test_a_second_expert_that_was_not_sampled_is_not_a_choice(convention):
  probs = jnp.full((1, 2, 2), .5)
  expert, routed = jnp.array([[[0, 1], [1, 0]]]), jnp.array([[[True, True], [True, False]]])
  loss = switch_loss(probs, expert, routed, everything(probs), convention)
  # Two choices of expert 1, one of expert 0: 2*(.5*1/3 + .5*2/3), or over two tokens 2*(.5*1/2 + .5*1).
  assert float(loss) == pytest.approx(dict(moejax=1., flaxformer=1.5)[convention])


def test_importance_and_load_are_zero_at_uniform_and_e_minus_one_at_collapse():
  uniform = jnp.zeros((2, 8, 4))
  collapsed = uniform.at[..., 1].set(200.)
  for loss in (lambda logits: importance_loss(logits, everything(logits)),
               lambda logits: load_loss(logits, logits, jnp.float32(.1), 1, everything(logits))):
    assert float(loss(uniform)) == pytest.approx(0, abs=1e-6)
    # All on one of E: mean 1/E, variance 1/E - 1/E^2.
    assert float(loss(collapsed)) == pytest.approx(3, rel=1e-5)


def test_the_collapsed_load_is_half_certain_because_the_threshold_includes_the_expert_itself():
  logits = jnp.zeros((1, 8, 4)).at[..., 1].set(200.)
  loads = jax.scipy.stats.norm.cdf(jnp.array([-2000., 0., -2000., -2000.]))
  np.testing.assert_array_equal(loads, [0, .5, 0, 0])  # the same CV^2 as (0, 1, 0, 0)
  assert float(load_loss(logits, logits, jnp.float32(.1), 1, everything(logits))) == pytest.approx(3)


def test_without_noise_the_load_counts_choices_and_has_no_gradient():
  logits = jnp.array([[[3., 2., 1.], [3., 1., 2.]]])  # two choices each: counts 2, 1, 1
  loss, gradient = jax.value_and_grad(
      lambda logits: load_loss(logits, logits, None, 2, everything(logits)))(logits)
  # Mean 4/3, population variance 2/9: 2/9 * 9/16.
  assert float(loss) == pytest.approx(1 / 8)
  np.testing.assert_array_equal(gradient, np.zeros(logits.shape))


def test_the_z_loss_at_zero_logits_is_the_squared_logarithm_of_e_and_its_gradient_two_log_z_softmax_over_t():
  logits = jnp.zeros((2, 3, 4))
  assert float(z_loss(logits, everything(logits))) == pytest.approx(np.log(4)**2)
  logits = jax.random.normal(KEY, (2, 3, 4))
  gradient = jax.grad(lambda logits: z_loss(logits, everything(logits)))(logits)
  exponentials = np.exp(np.asarray(logits, np.float64))
  total = exponentials.sum(-1, keepdims=True)
  np.testing.assert_allclose(gradient, 2 * np.log(total) * exponentials / total / 6, rtol=0, atol=1e-6)


def losses_of(logits, clean, valid):
  """Every loss, at K = 2."""
  probs, expert = jax.nn.softmax(logits), jnp.argsort(-logits, axis=-1, stable=True)[..., :2]
  routed = jnp.broadcast_to(valid[..., None], expert.shape)
  return dict(
      importance=importance_loss(clean, valid), z=z_loss(clean, valid),
      load=load_loss(logits, clean, jnp.float32(.5), 2, valid),
      **{convention: switch_loss(probs, expert, routed, valid, convention) for convention in CONVENTIONS})


def test_padding_tokens_and_empty_groups_change_no_loss():
  logits, clean = jax.random.normal(KEY, (2, 2, 6, 4))
  losses = jax.jit(losses_of)
  plain = losses(logits, clean, jnp.ones((2, 6), bool))
  garbage = jnp.full((2, 3, 4), 50.).at[..., 2].set(-30.)
  def pad(array):
    return jnp.concatenate([jnp.concatenate([garbage, array], axis=1), jnp.full((1, 9, 4), 7.)])
  padded = losses(pad(logits), pad(clean), jnp.zeros((3, 9), bool).at[:2, 3:].set(True))
  for name in plain:
    # Sums of the same float32 numbers in another order.
    np.testing.assert_allclose(padded[name], plain[name], rtol=1e-5, err_msg=name)


def test_losses_are_means_over_groups():
  logits, clean = jax.random.normal(KEY, (2, 2, 6, 4))
  losses = jax.jit(losses_of)
  both = losses(logits, clean, jnp.ones((2, 6), bool))
  one, two = (losses(logits[g:g + 1], clean[g:g + 1], jnp.ones((1, 6), bool)) for g in (0, 1))
  for name in set(both) - {'mixtral'}:
    np.testing.assert_allclose(both[name], (one[name] + two[name]) / 2, rtol=1e-5, err_msg=name)


def test_nothing_valid_gives_zero_and_not_nan():
  logits = jax.random.normal(KEY, (2, 6, 4))
  for name, loss in jax.jit(losses_of)(logits, logits, jnp.zeros((2, 6), bool)).items():
    assert loss == 0, name


def test_gradients_of_all_losses_equal_finite_differences():
  logits, clean, along, clean_along = jax.random.normal(KEY, (4, 2, 6, 4))
  valid = jnp.ones((2, 6), bool).at[1, 4:].set(False)
  at = jax.jit(lambda t: losses_of(logits + t * along, clean + t * clean_along, valid))
  slopes = jax.jit(jax.jacfwd(lambda t: losses_of(logits + t * along, clean + t * clean_along, valid)))(0.)
  step = 1e-3  # small enough to change no choice here; float32 differences are then good to about 1e-7/1e-3
  above, below = at(step), at(-step)
  np.testing.assert_array_equal(*(jnp.argsort(-(logits + t * along))[..., :2] for t in (step, -step)))
  for name in slopes:
    assert float(slopes[name]) == pytest.approx(float(above[name] - below[name]) / (2 * step), abs=2e-3), name


def test_a_bias_step_has_one_size_and_goes_against_the_load():
  stepped = bias_step(jnp.array([0., 1., -1., 5.]), jnp.array([4., 1., 1., 2.]), 0.25)  # mean load 2
  np.testing.assert_array_equal(stepped, [-.25, 1.25, -.75, 5.])


def build(config, k=2, noisy=True, num_experts=4):
  return router.balancers(config, 'config.balance', k=k, noisy=noisy, num_experts=num_experts)


def test_the_bias_changes_only_the_ranking():
  balancer = build(dict(bias=dict(rate=1e-3)))['bias']
  np.testing.assert_array_equal(balancer.bias[...], np.zeros(4))
  balancer.bias[...] = jnp.array([0., .5, 0., 0.])
  scores, gates = noiseless(jax.random.normal(KEY, (1, 3, 4))), jnp.full((1, 3, 4), .25)
  adjusted = balancer.adjust(scores, gates)
  np.testing.assert_array_equal(adjusted.select, np.broadcast_to([.25, .75, .25, .25], (1, 3, 4)))
  assert adjusted.logits is scores.logits and adjusted.clean is scores.clean


def test_the_bias_sees_the_choices_of_all_groups_without_padding():
  balancer = build(dict(bias=dict(rate=1.)), k=1, num_experts=3)['bias']
  plan = TokenPlan(expert=jnp.array([[[0], [0]], [[1], [2]]]), weight=jnp.ones((2, 2, 1)),
                   kept=jnp.array([[[True], [True]], [[True], [False]]]), num_experts=3)
  routed = Routed(scores=None, probs=None, plan=plan, valid=plan.kept[..., 0])
  state = dict(bias=balancer.bias[...])
  # Counts 2, 1, 0.
  np.testing.assert_array_equal(functional.merge_updates(state, balancer.update(routed))['bias'], [-1., 0., 1.])


def test_a_number_is_a_coefficient():
  balancers = build(dict(importance=0.5, switch=dict(coefficient=0.25, convention='mixtral')))
  assert balancers['importance'].coefficient == 0.5
  assert (balancers['switch'].coefficient, balancers['switch'].convention) == (0.25, 'mixtral')


@pytest.mark.parametrize('config, context, message', [
    (dict(importnce=0.1), dict(), r"config\.balance\.importnce\.name: there is no balance 'importnce'.*'importance'"),
    (dict(switch='0.1'), dict(), r"config\.balance\.switch\.coefficient must be a float of at least 0, not '0\.1'"),
    (dict(switch=dict(coefficient=.1, convention='switch')), dict(), r"convention must be one of 'moejax', 'gshard'"),
    (dict(switch=.1), dict(k=None), r'config\.balance\.switch requires token choice'),
    (dict(bias=dict()), dict(k=None), r'config\.balance\.bias requires token choice'),
    (dict(load=.1), dict(k=None), r'config\.balance\.load requires token choice'),
    (dict(load=.1), dict(noisy=False), r'config\.balance\.load: without noise'),
    (dict(bias=0.1), dict(), r'config\.balance\.bias\.coefficient: Bias has no such key.*rate'),
])
def test_a_balance_that_cannot_be_built_says_where_and_why(config, context, message):
  with pytest.raises(ConfigError, match=message):
    build(config, **context)
