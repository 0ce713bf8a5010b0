"""The router as a whole: metrics known in advance, state, transformations, devices, config errors."""
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import DensePlan

KEY = jax.random.key(0)
D, E = 8, 4


def with_(base, **changes):
  return {**base, **changes}


def functional_router(config, dim=D, num_experts=E):
  return functional.functionalize(
      lambda rngs: router.build(config, 'config.moe.router', dim=dim, num_experts=num_experts, rngs=rngs))


def route_logits(config, logits, valid=None, train=False):
  """Routes tokens whose features are their logits: the kernel is the identity."""
  logits = jnp.asarray(logits, jnp.float32)
  apply = functional_router(config, logits.shape[-1], logits.shape[-1]).apply
  return jax.jit(functools.partial(apply, train=train))(
      {'score': {'kernel': jnp.eye(logits.shape[-1])}}, {}, logits, RouterInputs(valid=valid), key=KEY)


def test_metrics_of_four_tokens_that_want_the_same_of_two_experts():
  config = dict(score=dict(name='linear'), select=dict(name='top_k', k=1),
                place=dict(name='capacity', capacity_factor=1.), balance=dict(switch=0.1, z=0.))
  metrics = route_logits(config, [[[np.log(3), 0.]] * 4]).metrics
  np.testing.assert_array_equal(metrics['load'], [1, 0])
  assert float(metrics['dropped']) == pytest.approx(0.5)            # two slots for four choices
  assert metrics['experts_per_token'] == 0.5
  assert float(metrics['confidence']) == pytest.approx(0.75)        # softmax (3/4, 1/4)
  assert float(metrics['entropy']) == pytest.approx(np.log(4) - .75 * np.log(3))
  assert float(metrics['switch_loss']) == pytest.approx(2 * 0.75)
  assert float(metrics['z_loss']) == pytest.approx(np.log(4)**2)    # log(3 + 1)


def test_losses_are_the_metrics_times_their_coefficients_and_absent_ones_are_absent():
  config = dict(score=dict(name='linear'), select=dict(name='top_k', k=1), balance=dict(switch=0.1, z=0.5))
  out = route_logits(config, jax.random.normal(KEY, (2, 3, 4)))
  assert set(out.losses) == {'switch', 'z'}
  assert set(out.metrics) == {'load', 'dropped', 'confidence', 'entropy', 'experts_per_token', 'switch_loss', 'z_loss'}
  assert float(out.losses['switch']) == pytest.approx(0.1 * float(out.metrics['switch_loss']))
  assert float(out.losses['z']) == pytest.approx(0.5 * float(out.metrics['z_loss']))


def test_metrics_leave_padding_out():
  config = dict(score=dict(name='linear'), select=dict(name='top_k', k=1),
                place=dict(name='capacity', capacity_factor=1.))
  out = route_logits(config, [[[9., 0.], [np.log(3), 0.], [0., np.log(3)]]], valid=jnp.array([[False, True, True]]))
  np.testing.assert_array_equal(out.metrics['load'], [.5, .5])
  assert out.metrics['dropped'] == 0
  assert out.metrics['experts_per_token'] == 1
  assert float(out.metrics['confidence']) == pytest.approx(0.75)


@pytest.mark.parametrize('select, weigh, expected', [
    (dict(name='expert_choice', capacity_factor=1.), {}, 4 / 3),  # two slots of each of two experts for three tokens
    (dict(name='all'), dict(weigh=dict(name='softmax')), 2),
])
def test_experts_per_token_are_slots_where_experts_choose_and_weights_above_zero_where_all_see_it(
    select, weigh, expected):
  config = dict(score=dict(name='linear'), select=select, **weigh)
  valid = jnp.array([[True, True, True, False]])
  out = route_logits(config, [[[4., 0.], [1., 0.], [0., 4.], [0., 1.]]], valid)
  assert float(out.metrics['experts_per_token']) == pytest.approx(expected)


def test_soft_slots_compute_mixtures_so_that_no_experts_per_token_are_reported():
  model = functional_router(papers.soft_moe(slots=1))
  out = model.apply(*model.init(KEY), jnp.ones((1, 4, D)), RouterInputs())
  assert 'experts_per_token' not in out.metrics and 'load' in out.metrics


def test_a_second_expert_that_was_not_drawn_is_not_dropped():
  config = dict(score=dict(name='linear'), select=dict(name='gshard_top_2', second='random'))
  out = route_logits(config, jnp.broadcast_to(jnp.array([5., 0.]), (1, 64, 2)), train=True)
  assert not out.plan.kept.all()
  assert out.metrics['dropped'] == 0


def test_with_expert_choice_a_token_that_no_expert_takes_is_dropped():
  # Both experts take their one token: the first, of which they are surest, and the third.
  config = dict(score=dict(name='linear'), select=dict(name='expert_choice', capacity_factor=0.5))
  out = route_logits(config, [[[4., 0.], [1., 0.], [0., 4.], [0., 1.]]])
  np.testing.assert_array_equal(out.plan.token[0], [[0], [2]])
  assert float(out.metrics['dropped']) == pytest.approx(0.5)
  np.testing.assert_array_equal(out.metrics['load'], [.5, .5])


def test_selecting_all_is_the_dense_mixture():
  logits = jax.random.normal(KEY, (2, 3, 4))
  out = route_logits(dict(score=dict(name='linear'), select=dict(name='all')), logits)
  assert isinstance(out.plan, DensePlan)
  # The same softmax behind a product with the identity.
  np.testing.assert_allclose(out.plan.weight, jax.nn.softmax(logits), rtol=1e-6)
  assert out.metrics['dropped'] == 0
  np.testing.assert_allclose(out.metrics['load'], jax.nn.softmax(logits).mean((0, 1)), rtol=1e-5)


def test_the_bias_moves_tokens_to_idle_experts_only_through_the_updates():
  config = dict(score=dict(name='linear', init_std=1.), select=dict(name='top_k', k=1), weigh=dict(name='sigmoid'),
                balance=dict(bias=dict(rate=0.02)))
  apply = functional_router(config)
  params, state = apply.init(KEY)
  params['score']['kernel'] += 0.5 * jnp.array([1., 0, 0, 0])  # expert 0 is favoured by tokens with a positive sum
  x = 0.3 + jax.random.normal(KEY, (4, 64, D))
  step = jax.jit(lambda state: apply.apply(params, state, x, RouterInputs(), train=True))
  first = step(state)
  for _ in range(60):
    state = functional.merge_updates(state, step(state).updates)
  last = step(state)
  def violation(out):  # MaxVio of the paper
    return float(out.metrics['load'].max()) * E - 1
  assert violation(first) > 0.4
  assert violation(last) < 0.2 * violation(first)
  np.testing.assert_array_equal(first.plan.expert == last.plan.expert, first.plan.weight == last.plan.weight)


def test_a_constant_bias_changes_nothing():
  apply = functional_router(papers.loss_free(k=2))
  params, state = apply.init(KEY)
  x = jax.random.normal(KEY, (1, 5, D))
  shifted = jax.tree.map(lambda bias: bias + 0.125, state)
  assert jax.tree.leaves(state)
  run = jax.jit(apply.apply)
  one, other = (run(params, s, x, RouterInputs()).plan for s in (state, shifted))
  np.testing.assert_array_equal(one.expert, other.expert)
  np.testing.assert_array_equal(one.weight, other.weight)


def test_the_bias_gets_no_gradient():
  apply = functional_router(papers.loss_free(k=2))
  params, state = apply.init(KEY)
  x = jax.random.normal(KEY, (1, 5, D))
  def total_weight(state):
    return apply.apply(params, state, x, RouterInputs(), train=True).plan.weight.sum()
  gradient = jax.jit(jax.grad(total_weight))(state)
  np.testing.assert_array_equal(gradient['balance']['bias']['bias'], np.zeros(E))


def test_a_router_is_the_same_under_vmap_and_inside_scan():
  config = with_(papers.loss_free(k=2), place=dict(name='capacity', capacity_factor=.7, priority='batch'))
  apply = functional_router(config)
  params, state = apply.init(KEY)
  x = jax.random.normal(KEY, (3, 2, 6, D))
  def route(x):
    out = apply.apply(params, state, x, RouterInputs(), train=True)
    return out.plan.kept, out.plan.expert, out.updates
  alone = jax.jit(route)
  one_by_one = [alone(batch) for batch in x]
  _, scanned = jax.jit(lambda x: jax.lax.scan(lambda _, batch: (None, route(batch)), None, x))(x)
  for together in (jax.jit(jax.vmap(route))(x), scanned):
    for i in range(3):
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[i], b), together, one_by_one[i])


def test_a_stack_of_routers_keeps_every_router_s_state_apart():
  def build(rngs):
    return router.build(papers.loss_free(k=2), 'config.moe.router', dim=D, num_experts=E, rngs=rngs)
  x = jax.random.normal(KEY, (1, 5, D))
  def scan(module, x):
    return functional.scan_modules(module, lambda layer, carry, _: (carry, layer(x, RouterInputs(), train=True)), 0)[1]
  class Stack(nnx.Module):
    def __init__(self, rngs):
      self.layers = functional.stack_modules(build, 3, rngs)
    def __call__(self, x):
      return scan(self.layers, x)
  apply = functional.functionalize(Stack)
  params, state = apply.init(KEY)
  updates = jax.jit(apply.apply)(params, state, x).updates
  load = updates['balance']['bias']['bias'].sums
  assert load.shape == (3, E)
  moved = functional.merge_updates(state, {'layers': updates})['layers']['balance']['bias']['bias']
  np.testing.assert_array_equal(moved, np.float32(1e-3) * np.sign(load.mean(-1, keepdims=True) - load))


@pytest.mark.parametrize('name', ['vmoe', 'expert_choice', 'soft_moe', 'loss_free'])
def test_groups_on_different_devices_route_without_moving_tokens(name):
  config = dict(vmoe=papers.vmoe(), expert_choice=papers.expert_choice(), soft_moe=papers.soft_moe(2),
                loss_free=papers.loss_free(k=2))[name]
  apply = functional_router(config)
  params, state = apply.init(KEY)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ('data',))
  x = jax.ShapeDtypeStruct((8, 16, D), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('data')))
  def step(params, state, x):
    def loss(params):
      out = apply.apply(params, state, x, RouterInputs(), key=KEY, train=True)
      slots = out.plan.to_slots() if getattr(out.plan, 'capacity', None) and hasattr(out.plan, 'slot') else out.plan
      return slots.scale(2.).shares().sum() + sum(out.losses.values()), (slots, out.metrics, out.updates)
    return jax.grad(loss, has_aux=True)(params)
  compiled = jax.jit(step).lower(params, state, x).compile().as_text()
  # Means and gradients over all groups are all-reduces; tokens stay where they are.
  assert not re.findall('all-gather|all-to-all|collective-permute', compiled)


@pytest.mark.parametrize('config, message', [
    (with_(papers.vmoe(), placing=dict()), r"config\.moe\.router\.placing: .* Did you mean 'place'"),
    (with_(papers.vmoe(), select=dict(name='topk', k=2)), r"config\.moe\.router\.select\.name: .* 'topk'.*'top_k'"),
    (with_(papers.vmoe(), select=dict(name='top_k', k=5)), r'router\.select: a token cannot choose 5 of 4 experts'),
    (with_(papers.vmoe(), select=dict(name='top_k', k='2')), r'select\.k must be an int'),
    (with_(papers.vmoe(), select=dict(name='top_k', num_experts=3, k=1)), r'select\.num_experts'),
    (with_(papers.vmoe(), place=dict(name='capacity', capacity_factr=1.)), r"Did you mean 'capacity_factor'"),
    (with_(papers.vmoe(), place=dict(name='capacity', capacity_factor=1., priority='first')),
     r"place\.priority must be one of 'position', 'batch', 'probability', 'random'"),
    (dict(select=dict(name='top_k', k=1)), r'config\.moe\.router\.score is missing'),
    (with_(papers.soft_moe(), select=dict(name='top_k', k=1)), r"score 'soft_moe' and select 'top_k' do not fit"),
    (with_(papers.vmoe(), select=dict(name='soft'), balance={}), r"score 'linear' and select 'soft' do not fit"),
    (with_(papers.soft_moe(), balance=dict(z=0.1)), r'config\.moe\.router\.balance: Soft MoE is balanced'),
    (with_(papers.expert_choice(), place=dict(name='capacity', capacity_factor=1.)), r'config\.moe\.router\.place: '),
    (with_(papers.hash_layers(9), features=dict(name='token')), r'config\.moe\.router\.score: .*token_ids'),
    (with_(papers.vmoe(), score=dict(name='linear')), r'config\.moe\.router\.balance\.load: without noise'),
])
def test_a_config_that_cannot_be_built_stops_with_its_path_and_what_is_allowed(config, message):
  with pytest.raises(ConfigError, match=message):
    functional_router(config)


def test_a_capacity_that_keeps_nothing_stops_while_tracing():
  config = with_(papers.vmoe(), place=dict(name='capacity', capacity_factor=0.1, convention='tutel'))
  apply = functional_router(config)
  params, state = apply.shapes()
  with pytest.raises(ValueError, match=r'config\.moe\.router\.place\.capacity_factor = 0\.1 drops every token'):
    jax.eval_shape(lambda params, state, x: apply.apply(params, state, x, RouterInputs(), key=KEY, train=True),
                   params, state, jax.ShapeDtypeStruct((2, 6, D), jnp.float32))
