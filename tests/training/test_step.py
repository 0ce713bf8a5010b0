"""The step: gradients do not depend on how the batch is split, over microbatches or devices; a non-finite step changes
nothing; the keys, the router state and the average follow their definitions.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fakes import EXAMPLEWISE, MODEL, TinyModel, TinyPipeline, make_setup

from moejax import functional
from moejax.functional import flatten
from moejax.random import derive
from moejax.training import optimizer, step
from moejax.training.durability import diagnosis, rollback

SGD = dict(name='sgd', schedule=dict(name='constant', peak=1.))


@functools.cache
def prepared(devices=1, accumulate=1, examplewise=False, padded=False, average=None):
  """(setup, compiled step), built once for all tests."""
  setup = make_setup(devices, TinyPipeline(padded=padded), optimizer_config=SGD,
                     model=EXAMPLEWISE if examplewise else MODEL,
                     training=dict(accumulate=accumulate, average=average))
  first = step.init_state(setup)
  return setup, step.make_train_step(setup), lambda: jax.tree.map(jnp.copy, first)  # the step donates its input


def steps(count, **kwargs):
  """(first state, last state, metrics of the last) of `count` steps over the fake batches, as numpy."""
  setup, train_step, init = prepared(**kwargs)
  state = init()
  first = jax.device_get(state)
  for number in range(count):
    state, metrics = train_step(state, setup.place(setup.pipeline.batch(number)))
  return first, jax.device_get(state), jax.device_get(metrics)


def assert_same(a, b, rtol=1e-5, atol=1e-6):
  # Sums in another order differ in the last bits of float32.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_microbatches_give_the_gradient_of_the_whole_batch_however_padding_is_spread():
  # Microbatch i holds every fourth example: all padding is in the last, which then counts for nothing.
  whole = steps(1, examplewise=True, padded=True)
  parts = steps(1, examplewise=True, padded=True, accumulate=4)
  assert_same(parts[1].params, whole[1].params)
  for name in ('train/loss', 'train/accuracy', 'train/grad_norm', 'gradient_norm/wi'):
    np.testing.assert_allclose(parts[2][name], whole[2][name], rtol=1e-5)


def test_router_losses_are_means_weighted_by_valid_tokens_and_state_moves_once():
  setup, _, _ = prepared(accumulate=4, padded=True)
  before, after, metrics = steps(1, accumulate=4, padded=True)
  batch = setup.pipeline.batch(0)

  def run(part, index):
    key = derive(derive(derive(jax.random.key(setup.seed), 0), 'microbatch'), index)
    return MODEL.apply(before.params, before.router_state, part, key=key, train=True)
  run = jax.jit(run, static_argnums=1)
  outputs = [run({name: values[index::4] for name, values in batch.items()}, index).routers['block_01']
             for index in range(4)]
  tokens = np.array([batch['valid'][index::4].sum() for index in range(4)])
  assert len(set(tokens)) > 1
  np.testing.assert_allclose(metrics['train/router_loss'],
                             np.average([o.losses['balance'] for o in outputs], weights=tokens), rtol=1e-5)
  load = np.average([o.metrics['load'] for o in outputs], axis=0, weights=tokens)
  np.testing.assert_allclose(metrics['router/block_01/load'], load, rtol=1e-5)
  np.testing.assert_allclose(after.router_state['load'], 0.9 / 4 + 0.1 * load, rtol=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_eight_devices_take_the_step_of_one(accumulate):
  one, eight = steps(3, accumulate=accumulate), steps(3, accumulate=accumulate, devices=8)
  assert_same(eight[0], one[0])
  assert_same(eight[1], one[1])
  assert_same(eight[2], one[2])


def test_step_n_draws_from_the_key_derived_for_n():
  setup, _, _ = prepared()
  second, metrics = steps(1)[1], steps(2)[2]
  batch = setup.pipeline.batch(1)

  @jax.jit
  def loss(key):
    output = MODEL.apply(second.params, second.router_state, batch, key=key, train=True)
    return setup.objective(output, batch)[0] + setup.objective.router_loss(output)
  np.testing.assert_allclose(metrics['train/loss'], loss(derive(jax.random.key(setup.seed), 1)), rtol=1e-5)


def test_the_loss_is_the_objective_plus_the_router_losses():
  metrics = steps(1)[2]
  assert metrics['train/router_loss'] > 0
  np.testing.assert_allclose(metrics['train/loss'], metrics['train/cross_entropy'] + metrics['train/router_loss'],
                             rtol=1e-6)
  assert metrics['router/block_01/load'].shape == (4,)


def test_a_gradient_step_descends_and_router_state_moves():
  before, after, _ = steps(1)
  assert after.step == 1
  assert not np.array_equal(before.router_state['load'], after.router_state['load'])
  # Plain descent with rate 1: the distance moved is the gradient's norm.
  leaves = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params))
  moved = np.sqrt(sum(np.square(a - b).sum() for a, b in leaves))
  np.testing.assert_allclose(moved, steps(1)[2]['train/grad_norm'], rtol=1e-4)


def test_the_average_follows_the_parameters_and_is_evaluated():
  states = [steps(1, average=0.75)[0]] + [steps(n, average=0.75)[1] for n in (1, 2, 3)]
  expected = flatten(states[0].params)
  for state in states[1:]:
    expected = {path: 0.75 * value + 0.25 * flatten(state.params)[path] for path, value in expected.items()}
  assert_same(flatten(states[-1].average), expected)
  assert states[-1].evaluated is states[-1].average
  assert steps(1)[1].evaluated is not None and steps(1)[1].average is None


def test_a_non_finite_step_changes_nothing_learned_and_reports_it():
  setup, train_step, init = prepared(average=0.75)
  before = jax.device_get(init())
  batch = setup.pipeline.batch(0)
  batch['image'][3] = np.nan
  after, metrics = train_step(init(), setup.place(batch))
  assert metrics['train/skipped'] and metrics['recovery/in_a_row'] == 1
  for name in ('params', 'router_state', 'average'):
    jax.tree.map(np.testing.assert_array_equal, getattr(before, name), jax.device_get(getattr(after, name)))
  assert after.step == 1 and after.skips['skipped'] == 1 and after.skips['accepted'] == 0
  schedules = [node for node in jax.tree.leaves(
      after.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState)) if hasattr(node, '_fields')]
  assert [node.count for node in schedules] == [1]  # the learning rate belongs to the step
  # and the next batch trains on from there
  after, metrics = train_step(after, setup.place(setup.pipeline.batch(0)))
  assert not metrics['train/skipped'] and metrics['recovery/in_a_row'] == 0 and after.step == 2


def spoils(part):
  """An optimizer whose updates are finite but for one element of `part`."""
  descent = optax.sgd(0.1)

  def update(gradients, state, params=None):
    updates, _ = descent.update(gradients, descent.init(params), params)
    if part == 'params':
      updates = {**updates, 'bias': updates['bias'].at[2, 3].set(jnp.nan)}
    return updates, state.at[1].set(jnp.inf) if part == 'opt_state' else state
  return optax.GradientTransformation(lambda params: jnp.zeros(3), update)


OVERFLOWS = {
    'a learning rate': dict(SGD, schedule=dict(name='constant', peak=1e39)),  # finite in a config, not in float32
    'a decay': dict(SGD, weight_decay=1e39),
    'the decay of another optimizer': dict(name='lion', weight_decay=1e39, schedule=dict(name='constant', peak=0.1)),
    'the parameters': optimizer.Optimizer(spoils('params'), optax.constant_schedule(0.1)),
    'the state of an optimizer': optimizer.Optimizer(spoils('opt_state'), optax.constant_schedule(0.1)),
}


@pytest.mark.parametrize('what', OVERFLOWS)
def test_a_non_finite_update_is_noticed_even_if_loss_and_gradient_are_finite(what):
  """A learning rate is known beforehand; any other overflow shows in the state that it leaves, which is not kept."""
  setup = make_setup()
  made = OVERFLOWS[what]
  if isinstance(made, dict):
    made = optimizer.build(made, 'config.optimizer', model=setup.model, steps=8)
  setup = dataclasses.replace(setup, optimizer=made)
  update = jax.jit(functools.partial(step.train_step, setup))
  state = before = step.init_function(setup)()
  for number in (0, 1):  # a rate or a decay of zeros is nothing yet
    before, (state, metrics) = state, update(state, setup.place(setup.pipeline.batch(number)))
    if metrics['recovery/in_a_row']:
      break
  assert np.isfinite([metrics['train/loss'], metrics['train/grad_norm']]).all()
  assert metrics['recovery/in_a_row'] == state.skips['in_a_row'] > 0
  if what == 'a learning rate':
    assert metrics['train/skipped'] and rollback.sound(metrics)
    jax.tree.map(np.testing.assert_array_equal, before.params, state.params)
    assert 'are finite; the learning rate is inf' in diagnosis.explain(metrics, {})
  else:
    assert not metrics['train/skipped'] and not rollback.sound(metrics) and metrics['recovery/not_finite'] > 0
    assert 'are finite; the update is not' in diagnosis.explain(metrics, {})


def test_non_finite_router_state_is_not_kept():
  class Overflowing(TinyModel):
    def __call__(self, batch, *, key=None, train=False):
      output = super().__call__(batch, key=key, train=train)
      return dataclasses.replace(output, updates={'load': self.load[...] / 0.}) if train else output

  setup = make_setup(model=functional.functionalize(Overflowing))
  state, metrics = jax.jit(functools.partial(step.train_step, setup))(
      step.init_function(setup)(), setup.place(setup.pipeline.batch(0)))
  assert metrics['train/skipped'] and metrics['recovery/not_finite'] == 1
  np.testing.assert_array_equal(state.router_state['load'], np.full(4, 0.25))


def test_checking_an_update_takes_no_second_copy_of_the_parameters(monkeypatch):
  setup = make_setup()
  def temporaries():
    update = jax.jit(functools.partial(step.train_step, setup), donate_argnums=0)
    program = update.lower(step.abstract_state(setup), setup.pipeline.batch_spec()).compile()
    return program.memory_analysis().temp_size_in_bytes
  judged = temporaries()
  monkeypatch.setattr(step, 'not_finite', lambda tree: jnp.int32(0))
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(step.init_function(setup)().params))
  assert judged < temporaries() + size


def test_the_step_is_compiled_once():
  _, train_step, _ = prepared()
  steps(3)
  assert train_step._cache_size() == 1  # the first state must have the types and shardings of those that follow


def test_parameters_and_optimizer_state_are_spread_over_the_mesh():
  setup = make_setup(8, mesh=dict(data=2, expert=4), optimizer_config=dict(
      name='adamw', schedule=dict(name='constant', peak=1.)))
  state = step.init_state(setup)
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if leaf.shape == state.params['wi'].shape}
  assert len(leaves) == 3  # the parameter and Adam's two moments
  for leaf in leaves.values():
    assert leaf.addressable_shards[0].data.shape[0] == 1  # one expert of four
  assert jnp.isfinite(state.params['wi']).all()


def test_the_moving_average_follows_its_recursion():
  # From 1 with decay 0.5: 0.5*1 + 0.5*3 = 2, then 0.5*2 + 0.5*5 = 3.5.
  average = step.moving_average({'a': jnp.float32(1)}, {'a': jnp.float32(3)}, 0.5)
  assert average['a'] == 2.
  assert step.moving_average(average, {'a': jnp.float32(5)}, 0.5)['a'] == 3.5


def test_gradient_norms_are_reported_by_module():
  tree = {'a': {'wi': jnp.array([3., 0.]), 'wo': jnp.array([[4.]])}, 'head': jnp.array([2.])}
  norms = step.norms_by_module(tree)
  assert {name: float(norm) for name, norm in norms.items()} == {'a': 5., 'head': 2.}
