"""Descent with gradients of equal size for every expert, against the definition in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.functional import flatten, unflatten
from moejax.routing import papers
from moejax.training import normalized_descent, optimizer

AXES = dict(moe=dict(experts=dict(kernel=('expert', 'embed', None), bias=('expert', None)),
                     router=dict(kernel=('embed', None))),
            stack=dict(experts=dict(kernel=('layers', 'expert', 'embed', None))))
SHAPES = dict(moe=dict(experts=dict(kernel=(3, 4, 2), bias=(3, 2)), router=dict(kernel=(4, 3))),
              stack=dict(experts=dict(kernel=(2, 3, 4, 2))))


def gradients():
  generator = np.random.default_rng(0)
  return unflatten({path: jnp.asarray(generator.normal(size=shape), jnp.float32)
                    for path, shape in flatten(SHAPES).items()})


def test_every_expert_takes_an_equally_large_step():
  before = gradients()
  before['moe']['experts'] = jax.tree.map(lambda g: g.at[2].set(0), before['moe']['experts'])
  transform = normalized_descent.normalized_by_expert(AXES)
  after = jax.tree.map(np.asarray, transform.update(before, transform.init(before))[0])
  experts = jax.tree.map(lambda g: np.asarray(g, np.float64), before['moe']['experts'])
  for e in range(2):
    total = np.linalg.norm(experts['kernel'][e]) + np.linalg.norm(experts['bias'][e])
    for name in ('kernel', 'bias'):
      np.testing.assert_allclose(after['moe']['experts'][name][e], experts[name][e] / total, rtol=1e-5)
  for name in ('kernel', 'bias'):  # an expert that no example chose stays unchanged
    np.testing.assert_array_equal(after['moe']['experts'][name][2], 0)
  np.testing.assert_array_equal(after['moe']['router']['kernel'], before['moe']['router']['kernel'])
  stacked = np.asarray(before['stack']['experts']['kernel'], np.float64)
  expected = stacked / np.sqrt((stacked**2).sum((2, 3), keepdims=True))
  np.testing.assert_allclose(after['stack']['experts']['kernel'], expected, rtol=1e-5)


@pytest.mark.parametrize('momentum', [None, 0.5])
def test_the_optimizer_steps_experts_and_others_at_rates_of_their_own(momentum):
  model = models.build(dict(name='patch_mixture', image_size=4, patch_size=2, num_classes=2, moe=dict(
      num_experts=3, experts=dict(filters=2), router=papers.understanding_moe())))
  transform = optimizer.build(dict(name='normalized_sgd', momentum=momentum, others=100.,
                                   schedule=dict(name='constant', peak=1e-3)), 'config.optimizer',
                              model=model, steps=10).transform
  generator = np.random.default_rng(1)
  gradient = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), model.shapes()[0])
  update = jax.jit(transform.update)
  state = transform.init(gradient)
  _, state = update(gradient, state, gradient)
  updates, _ = update(gradient, state, gradient)
  factor = 1.5 if momentum else 1.  # the second of two equal gradients: 1 + 0.5
  layer, moved = gradient['blocks']['0']['moe'], updates['blocks']['0']['moe']
  total = sum(np.sqrt(np.square(np.asarray(g, np.float64)).reshape(3, -1).sum(1)) for g in layer['experts'].values())
  np.testing.assert_allclose(moved['experts']['bias'], -1e-3 * factor * layer['experts']['bias'] / total[:, None, None],
                             rtol=1e-5)
  np.testing.assert_allclose(moved['router']['score']['kernel'], -0.1 * factor * layer['router']['score']['kernel'],
                             rtol=1e-5)
