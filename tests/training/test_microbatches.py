"""Router metrics and losses over microbatches equal those of the whole batch, however its padding is spread."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_fakes import BATCH, CLASSES, FEATURES, TinyPipeline, make_setup

from moejax import functional
from moejax.models.output import ModelOutput
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.training import step

EXPERTS = 4
ROUTER = dict(score=dict(name='linear', init_std=1.), select=dict(name='top_k', k=2),
              weigh=dict(name='sigmoid'), balance=dict(bias=dict(rate=1.), z=1., importance=1.))
SUMS = 'sums over tokens'
PADDING = {  # microbatch i of n is every n-th row from i on
    'none': np.ones(BATCH, bool),
    'every second row': np.arange(BATCH) % 2 == 0,
    'all but one of every fourth row': (np.arange(BATCH) % 4 != 3) | (np.arange(BATCH) == 3),
    'the last rows': np.arange(BATCH) < 5,
}


class OneRouter(nnx.Module):
  """Every example is a token; the classes are a linear function of its weights."""

  def __init__(self, rngs, config):
    self.router = router.build(config, 'router', dim=FEATURES, num_experts=EXPERTS, rngs=rngs)
    self.head = functional.parameter(rngs, nnx.initializers.normal(1.), (EXPERTS, CLASSES), (None, None))

  def __call__(self, batch, *, key=None, train=False):
    x = batch['image'].reshape(1, -1, FEATURES)
    routed = self.router(x, RouterInputs(valid=batch['valid'][None]), train=train)
    logits = routed.plan.to_dense().weight[0] @ self.head[...]
    return ModelOutput(logits, x[0], {'block_00': routed}, {'router': routed.updates})


class Padded(TinyPipeline):

  def __init__(self, valid):
    super().__init__()
    self.rows = valid

  def batch(self, number):
    return super().batch(number) | dict(valid=self.rows)


@functools.cache
def compiled(accumulate, losses):
  config = papers.dselect_k(k=2, entropy=0.1, reachable=0.) if losses == SUMS else (
      ROUTER | dict(balance={name: ROUTER['balance'][name] for name in losses}))
  model = functional.functionalize(lambda rngs: OneRouter(rngs, config))
  setup = make_setup(model=model, optimizer_config=dict(name='sgd', schedule=dict(name='constant', peak=1.)),
                     training=dict(accumulate=accumulate))
  return setup, step.make_train_step(setup)


def stepped(accumulate, padding, losses=('bias', 'z')):
  setup, train_step = compiled(accumulate, losses)
  return jax.device_get(train_step(step.init_state(setup), setup.place(Padded(PADDING[padding]).batch(0))))


@pytest.mark.parametrize('accumulate', [2, 4, 8])
@pytest.mark.parametrize('padding', PADDING)
def test_means_over_tokens_and_the_balancing_bias_are_those_of_the_whole_batch(padding, accumulate):
  (whole, metrics), (parts, others) = stepped(1, padding), stepped(accumulate, padding)
  # Sums of some numbers of order one in another order.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, parts.params, whole.params)  # so the gradient is
  for name in ('train/loss', 'train/router_loss', 'router/block_00/z_loss', 'router/block_00/entropy',
               'router/block_00/confidence', 'router/block_00/load'):
    close(others[name], metrics[name], err_msg=name)
  np.testing.assert_array_equal(parts.router_state['router']['balance']['bias']['bias'],
                                whole.router_state['router']['balance']['bias']['bias'])
  assert set(np.unique(whole.router_state['router']['balance']['bias']['bias'])) <= {-1., 0., 1.}


def test_a_microbatch_without_tokens_counts_for_nothing_in_any_loss():
  whole, parts = (stepped(count, 'every second row', ('importance', 'z')) for count in (1, 2))
  np.testing.assert_allclose(parts[1]['router/block_00/importance_loss'], whole[1]['router/block_00/importance_loss'],
                             rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), parts[0].params, whole[0].params)


@pytest.mark.parametrize('padding', ['none', 'all but one of every fourth row'])
def test_a_loss_summed_over_tokens_is_the_sum_over_all_microbatches(padding):
  whole, parts = (stepped(count, padding, SUMS) for count in (1, 4))
  name = 'router/block_00/selector_entropy_loss'
  np.testing.assert_allclose(parts[1][name], whole[1][name], rtol=1e-5)
  np.testing.assert_allclose(parts[1]['train/router_loss'], 0.1 * whole[1][name], rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), parts[0].params, whole[0].params)


def test_counting_tokens_computes_nothing_else():
  setup, _ = compiled(4, ('bias', 'z'))
  state = jax.eval_shape(step.init_function(setup))
  microbatches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, len(x) // 4, *x.shape[1:]), x.dtype),
                              Padded(PADDING['none']).batch(0))
  shares = jax.jit(lambda state, parts: step.token_shares(setup, state, parts, jax.random.key(0)))
  program = shares.lower(state, microbatches).compile().as_text()
  assert 'reduce' in program and 'dot(' not in program and 'exponential' not in program


def test_state_that_does_not_depend_on_tokens_is_the_same_in_every_microbatch():
  statistics = lambda sums: functional.Statistics(jnp.asarray(sums), rule)
  one = dict(a=statistics([1., 2.]), b=dict(step=jnp.int32(4)))
  other = dict(a=statistics([3., -1.]), b=dict(step=jnp.int32(4)))
  state = dict(a=jnp.array([10., 20.]), b=dict(step=jnp.int32(3), kept=jnp.float32(7)))
  moved = functional.merge_updates(state, functional.add_updates(one, other))
  np.testing.assert_array_equal(moved['a'], [14., 21.])
  assert moved['b']['step'] == 4 and moved['b']['kept'] == 7


def rule(old, sums):
  return old + sums
