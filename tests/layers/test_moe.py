"""The MoE layer: identities that hold for any router, grouping, and the same numbers on 8 devices."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.feed_forwards.moe import MoE, check_experts, tokens_per_group
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.routing import papers
from moejax.routing.inputs import RouterInputs

B, S, D, F, E = 8, 4, 6, 10, 4
PLACED = ['reference', 'einsum', 'gather', 'grouped']


def build(dispatch='gather', router=None, **config):
  config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=F), dispatch=dict(name=dispatch),
                router=papers.vmoe(k=2) if router is None else router) | config
  return functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)


def random_params(layer, identical=False):
  """Normal values for every parameter; all experts the first one where `identical`."""
  rng = np.random.RandomState(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), layer.shapes()[0])
  if identical:
    params['experts'] = jax.tree.map(lambda w: np.broadcast_to(w[:1], w.shape), params['experts'])
  return params


def run(layer, params, *arguments, **kwargs):
  return jax.jit(lambda params, *arguments: layer.apply(params, {}, *arguments, **kwargs))(params, *arguments)


def tokens(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, S, D))


def feed_forward(params, x):
  """One dense expert in float64."""
  wi, wo = (np.asarray(params[name], np.float64) for name in ('wi', 'wo'))
  z = np.asarray(x, np.float64) @ wi
  return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) @ wo


# float32 sums of some tens of terms of order one.
CLOSE = dict(rtol=0, atol=1e-5)


@pytest.mark.parametrize('dispatch', PLACED)
def test_one_expert_is_the_dense_expert_times_its_gate(dispatch):
  layer = build(dispatch, papers.switch(), num_experts=1)
  params = random_params(layer)
  y, output = run(layer, params, tokens())
  gate = output.plan.to_dense().weight.reshape(B, S, 1)
  dense = feed_forward(jax.tree.map(lambda w: w[0], params['experts']), tokens())
  np.testing.assert_allclose(y, gate * dense, **CLOSE)
  np.testing.assert_allclose(gate, 1., rtol=1e-6)  # the softmax over one expert


@pytest.mark.parametrize('dispatch', PLACED)
def test_identical_experts_give_the_sum_of_kept_gates_times_the_dense_expert(dispatch):
  router = papers.vmoe(k=2) | dict(place=dict(name='capacity', capacity_factor=0.5))
  layer = build(dispatch, router, group='sequence')
  params = random_params(layer, identical=True)
  y, output = run(layer, params, tokens())
  assert output.metrics['dropped'] > 0.05  # some gates are not kept
  gates = output.plan.to_dense().weight.sum(-1).reshape(B, S, 1)
  np.testing.assert_allclose(y, gates * feed_forward(jax.tree.map(lambda w: w[2], params['experts']), tokens()),
                             **CLOSE)


def test_the_plan_is_by_token_after_a_reshape():
  """Two groups of two sequences each: y is the loop over [B,S] tokens and the plan's dense weights."""
  layer = build('gather', group=2 * S)
  params = random_params(layer)
  y, output = run(layer, params, tokens())
  assert output.plan.expert.shape[:2] == (B // 2, 2 * S)
  weight = np.asarray(output.plan.to_dense().weight.reshape(B, S, E), np.float64)
  expected = sum(weight[..., e, None] * feed_forward(jax.tree.map(lambda w: w[e], params['experts']), tokens())
                 for e in range(E))
  np.testing.assert_allclose(y, expected, **CLOSE)


@pytest.mark.parametrize('router, dispatchers', [
    (papers.top_k_dropless(k=2), ['reference', 'grouped']),
    (papers.expert_choice(), ['reference', 'gather']),
    (papers.soft_moe(slots=2), ['reference', 'einsum']),
], ids=['dropless', 'expert choice', 'soft'])
def test_papers_without_capacity_give_the_same_under_two_dispatchers(router, dispatchers):
  layers = [build(dispatch, router, group='sequence') for dispatch in dispatchers]
  y = [run(layer, random_params(layer), tokens())[0] for layer in layers]
  assert abs(y[0]).max() > 0.1
  np.testing.assert_allclose(*y, **CLOSE)


def test_the_shared_expert_is_added_for_every_token():
  layer = build(shared=dict(name='feed_forward', hidden=3))
  params = random_params(layer)
  assert params['shared']['wi'].shape == (D, 3) and layer.axes['shared']['wi'] == ('embed', 'mlp')
  y, _ = run(layer, params, tokens())
  routed, _ = run(build(), {name: p for name, p in params.items() if name != 'shared'}, tokens())
  np.testing.assert_allclose(y - routed, feed_forward(params['shared'], tokens()), **CLOSE)


def test_padding_changes_no_other_output():
  layer = build('gather', group='batch')
  params = random_params(layer)
  valid = jnp.ones((B, S), bool).at[3:, 1].set(False)
  other = jnp.where(valid[..., None], tokens(), tokens(seed=2))
  route = jax.jit(lambda x: layer.apply(params, {}, x, RouterInputs(valid=valid))[0])
  y, z = route(tokens()), route(other)
  np.testing.assert_array_equal(y[valid], z[valid])
  assert not y[~valid].any()


SHARED = dict(name='feed_forward', hidden=3)
HOLDING = [np.nan, np.inf, np.array([np.inf, -np.inf, np.nan, 1., 2., 3.])]


@pytest.mark.parametrize('dispatch, router, config', [
    *((dispatch, papers.vmoe(k=2), dict(shared=SHARED, group='sequence')) for dispatch in PLACED),
    ('grouped', papers.top_k_dropless(k=2), {}),
    ('gather', papers.expert_choice(), dict(group='sequence')),
    ('einsum', papers.expert_choice(), dict(group='sequence')),
    ('einsum', papers.soft_moe(slots=2), dict(group='sequence')),
    ('reference', papers.soft_moe(slots=2), dict(group='sequence')),
    ('reference', papers.dselect_k(k=2), {}),
    ('einsum', papers.lucidrains(straight_through=True), {}),
], ids=lambda value: value if isinstance(value, str) else '')
def test_padding_may_hold_anything(dispatch, router, config):
  """NaN in padding changes no output, no loss and no gradient."""
  layer = build(dispatch, router, **config)
  params = random_params(layer)
  valid = jnp.ones((B, S), bool).at[3:, 1].set(False).at[5].set(False)

  @jax.jit
  def step(params, x):
    def loss(params, x):
      y, output = layer.apply(params, {}, x, RouterInputs(valid=valid), key=jax.random.key(0), train=True)
      return jnp.where(valid[..., None], y**2, 0).sum() + sum(output.losses.values()), (y, output.losses)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

  (_, (y, losses)), gradients = step(params, tokens())
  assert np.isfinite(y).all() and not gradients[1][~valid].any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  for held in HOLDING:
    found = step(params, jnp.where(valid[..., None], tokens(), held))
    np.testing.assert_array_equal(found[0][1][0][valid], y[valid])
    assert np.isfinite(found[0][1][0]).all()
    jax.tree.map(np.testing.assert_array_equal, (found[0][1][1], found[1]), (losses, gradients))


def test_training_uses_its_key_by_name_and_evaluation_none():
  layer = build(experts=dict(name='feed_forward', hidden=F, dropout=0.5))
  params = random_params(layer)
  step = jax.jit(lambda key: layer.apply(params, {}, tokens(), key=key, train=True))
  (y, output), (y2, output2) = step(jax.random.key(0)), step(jax.random.key(1))
  assert (y != y2).any() and (output.metrics['confidence'] != output2.metrics['confidence'])  # dropout, noise
  np.testing.assert_array_equal(y, step(jax.random.key(0))[0])
  jax.eval_shape(layer.apply, params, {}, tokens())  # neither needs a key nor asks for one


def test_the_dtype_of_x_is_kept_and_the_router_stays_float32():
  layer = build('einsum', shared=dict(name='feed_forward', hidden=3))
  y, output = jax.eval_shape(layer.apply, *layer.shapes(), jax.ShapeDtypeStruct((B, S, D), jnp.bfloat16))
  assert y.dtype == jnp.bfloat16 and y.shape == (B, S, D)
  assert output.plan.weight.dtype == jnp.float32


# Groups.


@pytest.mark.parametrize('group, batch, length, expected', [
    ('batch', 8, 4, 32), ('sequence', 8, 4, 4), (16, 8, 4, 16),
    (100, 8, 4, 32),  # not above the 32 tokens there are
    (20, 8, 6, 16),  # the divisors of 48 are .. 12, 16, 24
    (1, 3, 5, 1),
])
def test_a_group_is_the_largest_divisor_of_the_tokens_up_to_the_configured_size(group, batch, length, expected):
  assert tokens_per_group(group, batch, length, 'group') == expected


@pytest.mark.parametrize('group', [16, 0, -4])
def test_tokens_that_divide_into_no_such_groups_are_refused(group):
  with pytest.raises(ConfigError, match='config.moe.group: 1 x 31 tokens .* Choose a divisor of 31'):
    tokens_per_group(group, 1, 31, 'config.moe.group')


@pytest.mark.parametrize('batch, length', [(2**31, 1), (2**16, 2**15), (3, 2**30)])
def test_tokens_beyond_32_bits_are_refused(batch, length):
  assert tokens_per_group('batch', 2**31 - 1, 1, 'config.moe.group') == 2**31 - 1
  with pytest.raises(ConfigError, match='config.moe.group: a batch of .* Lower config.data.batch_size'):
    tokens_per_group('batch', batch, length, 'config.moe.group')


# Refusals.


@pytest.mark.parametrize('config, message', [
    (dict(num_expert=3), "config.moe.num_expert: .* Did you mean 'num_experts'"),
    (dict(group='tokens'), 'config.moe.group must be'),
    (dict(num_experts=0), 'config.moe.num_experts must be an int from 1 to 1048576, not 0'),
    (dict(experts=dict(name='feed_forward')), 'config.moe.experts.hidden is missing'),
    (dict(dispatch='gathered'), "config.moe.dispatch.name: .* 'gathered'"),
    (dict(shared=dict(name='feed_forward', hidden=3, activation='tanh')), 'config.moe.shared.activation'),
])
def test_configs_that_do_not_fit_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    build(**config)


def test_a_router_that_the_dispatcher_cannot_run_is_refused_before_compilation():
  layer = build('gather', papers.top_k_dropless())
  with pytest.raises(ConfigError, match="config.moe.dispatch: dispatcher 'gather' cannot run a TokenPlan without"):
    jax.eval_shape(layer.apply, *layer.shapes(), tokens())


# Devices.


@pytest.fixture(scope='module')
def mesh():
  return mesh_lib.build(dict(data=2, expert=4), 'config.mesh')


def loss_and_gradients(layer):
  def loss(params, x):
    y, output = layer.apply(params, {}, x)
    return jnp.mean(y**2) + sum(output.losses.values())
  return jax.jit(jax.value_and_grad(loss, (0, 1)))


@functools.cache
def on_one_device(group):
  layer = build('reference', group=group)
  return loss_and_gradients(layer)(random_params(layer), tokens())


def sharded(layer, mesh):
  params = random_params(layer)
  return (jax.device_put(params, rules.shardings(mesh, layer.axes, params)),
          jax.device_put(tokens(), rules.batch_sharding(mesh)))


def collectives(program):
  """Names of the collectives in a compiled program, in its order."""
  names = 'all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute'
  return re.findall(rf'= [^=]*?\b({names})(?:-start)?\(', program.as_text())


@pytest.mark.parametrize('dispatch, group', [
    ('einsum', 'sequence'), ('gather', 'sequence'), ('gather', 'batch'), ('grouped', 'batch')])
def test_eight_devices_give_the_loss_and_gradients_of_one(dispatch, group, mesh):
  layer = build(dispatch, group=group)
  with rules.use(mesh):
    arguments = sharded(layer, mesh)
    assert len(arguments[0]['experts']['wi'].addressable_shards[0].data) == E // 4
    program = loss_and_gradients(layer).lower(*arguments).compile()
  # The same sums in another order; the mean's gradients are below one.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               program(*arguments), on_one_device(group))
  if group == 'sequence':  # Tokens travel there and back, and so do their gradients; expert weights stay.
    counted = collectives(program)
    assert counted.count('all-to-all') == 4 and set(counted) == {'all-to-all', 'all-reduce'}


@pytest.mark.parametrize('dispatch', ['einsum', 'gather'])
def test_a_forward_pass_communicates_by_two_all_to_alls_alone(dispatch, mesh):
  layer = build(dispatch, group='sequence')
  with rules.use(mesh):
    program = jax.jit(lambda params, x: layer.apply(params, {}, x)[0]).lower(*sharded(layer, mesh)).compile()
  assert collectives(program) == ['all-to-all'] * 2


def test_experts_that_the_mesh_cannot_share_out_are_refused_when_built(mesh):
  with rules.use(mesh), pytest.raises(ConfigError, match='config.moe.num_experts = 6 .* multiple of 4'):
    build(num_experts=6)
  check_experts(8, mesh)
  check_experts(6, None)
