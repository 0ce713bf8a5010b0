"""Stacks: how patterns are factored, and that a scan equals the unrolled loop."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st

from moejax import functional
from moejax.layers.stack import Stack, factor
from moejax.layers.sublayer import Left
from moejax.random import derive
from moejax.routing.plans import DensePlan
from moejax.routing.router import RouterOutput

D, S = 'dense', 'sparse'
TRAILING = (D, D, D, S, D, S)  # two segments, the second with a unit of two


def spell(segments):
  return tuple(itertools.chain.from_iterable(unit * repeats for unit, repeats in segments))


@given(st.lists(st.sampled_from('abc'), max_size=12).map(tuple))
def test_segments_spell_the_pattern(kinds):
  assert spell(factor(kinds)) == kinds


@pytest.mark.parametrize('kinds, segments', [
    ((D,) * 32, (((D,), 32),)),
    ((D, S) * 6, (((D, S), 6),)),
    ((D, D, D, S) * 3, (((D, D, D, S), 3),)),
    ((D,) * 8 + (D, S) * 2, (((D,), 8), ((D, S), 2))),
    ((D,) * 6 + (S,) * 6, (((D,), 6), ((S,), 6))),
    ((), ()),
])
def test_patterns_of_papers_need_few_blocks(kinds, segments):
  assert factor(kinds) == segments


class Counter(nnx.Module):
  """Router state."""

  def __init__(self):
    self.count = functional.router_state(jnp.zeros(()), ())


class Mixture(nnx.Module):
  """A sublayer with a router."""

  def __init__(self):
    self.router = Counter()


class Toy(nnx.Module):
  """A block with a parameter, router state, and noise from its key."""

  def __init__(self, kind, rngs):
    self.w = functional.parameter(rngs, nnx.initializers.normal(1.), (3, 3), ('embed', 'mlp'))
    self.moe = Mixture() if kind == S else None


def step(block, x, key, depth, cache):
  x = jnp.tanh(x @ block.w[...] + 0.1 * depth + 0.1 * jax.random.normal(derive(key, 'noise'), x.shape))
  if block.moe is None:
    return x, {}
  output = RouterOutput(DensePlan(x), losses=dict(aux=jnp.square(x).sum()), metrics=dict(depth=depth),
                        updates=dict(count=block.moe.router.count[...] + depth))
  return x, dict(moe=Left(output))


X, KEY = jnp.ones((2, 3)) * 0.3, jax.random.key(1)


@functools.cache
def functionalized(stacking='scan', remat='none'):
  """(stack, model, params, state)"""
  stack = Stack(TRAILING, stacking, remat)

  class Model(nnx.Module):

    def __init__(self, rngs):
      self.blocks = stack.build(Toy, rngs)

    def __call__(self, x, key):
      return stack.run(self.blocks, step, x, key)[:3]

  model = functional.functionalize(Model)
  return stack, model, *jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope='module')
def runs():
  """value, gradients in unrolled form, outputs and updates of the same stack run in different ways"""
  results = {}
  for stacking, remat in [('unrolled', 'none'), ('scan', 'none'), ('scan', 'full'), ('unrolled', 'dots')]:
    stack, model, params, state = functionalized(stacking, remat)

    @jax.jit
    def run(params):
      def loss(params):
        y, routers, updates = model.apply(params, state, X, KEY)
        return y.sum() + sum(router.losses['aux'] for router in routers.values()), (routers, updates)
      return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (routers, updates)), grads = run(params)
    merged = functional.merge_updates(state, dict(blocks=updates))
    if stacking == 'scan':
      params, grads, merged = (dict(blocks=stack.unrolled(tree['blocks'])) for tree in (params, grads, merged))
    results[stacking, remat] = dict(value=value, params=params, grads=grads, routers=routers, state=merged)
  return results


def test_scanned_and_unrolled_start_equal_from_the_same_key(runs):
  jax.tree.map(np.testing.assert_array_equal, runs['unrolled', 'none']['params'], runs['scan', 'none']['params'])


def test_values_and_gradients_do_not_depend_on_scan_or_rematerialisation(runs):
  reference = runs['unrolled', 'none']
  for run in runs.values():
    for part in ('value', 'grads', 'state'):
      # The same operations, which the compiler may fuse differently.
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run[part], reference[part])


def test_every_sparse_layer_reports_by_its_depth(runs):
  for run in runs.values():
    assert list(run['routers']) == ['block_03', 'block_05']
    assert [int(router.metrics['depth']) for router in run['routers'].values()] == [3, 5]
    assert all(router.updates == {} for router in run['routers'].values())


def test_losses_inside_a_scan_reach_the_gradient():
  stack, model, params, state = functionalized()
  loss = lambda params: model.apply(params, state, X, KEY)[1]['block_03'].losses['aux']
  grads = stack.unrolled(jax.jit(jax.grad(loss))(params)['blocks'])
  reached = [bool(np.any(np.asarray(grads[str(depth)]['w']) != 0)) for depth in range(6)]
  assert reached == [True, True, True, True, False, False]


def test_updates_mirror_the_state(runs):
  for run in runs.values():
    counts = {path: float(leaf) for path, leaf in functional.flatten(run['state']).items()}
    assert counts == {'blocks/3/moe/router/count': 3., 'blocks/5/moe/router/count': 5.}


def test_every_layer_gets_a_key_of_its_own():
  stack, model, params, state = functionalized()
  zeros = jax.tree.map(jnp.zeros_like, params)  # so that what comes out of a layer is tanh(0.1 depth + 0.1 noise)
  routers = jax.jit(model.apply)(zeros, state, X, KEY)[1]
  noise = [np.arctanh(routers[f'block_{depth:02d}'].plan.weight) - 0.1 * depth for depth in (3, 5)]
  assert not np.allclose(noise[0], noise[1])


def test_scanned_and_unrolled_trees_convert_both_ways():
  stack, _, params, state = functionalized()
  for tree in (params['blocks'], state['blocks']):
    jax.tree.map(np.testing.assert_array_equal, stack.scanned(stack.unrolled(tree)), tree)
  assert set(stack.unrolled(state['blocks'])) == {'3', '5'}


def test_only_the_units_of_segments_are_compiled():
  for stacking, bodies in [('scan', 3), ('unrolled', 6)]:  # dense; dense, sparse
    _, model, params, state = functionalized(stacking)
    assert str(jax.make_jaxpr(model.apply)(params, state, X, KEY)).count('= tanh') == bodies
