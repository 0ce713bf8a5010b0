"""The speech model: who trains the shared network, who sees it, and that padding is not heard."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.routing import papers
from moejax.training import objectives

SHARED = dict(dim=4, num_layers=1, attention=dict(heads=1), feed_forward=dict(hidden=4))


def config(**changes):
  return dict(dict(
      name='speech', num_features=3, vocab_size=4, dim=8, num_layers=2, attention=dict(heads=2),
      feed_forward=dict(hidden=8), sparse=dict(name='every', n=1), shared=SHARED,
      moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=papers.speech_moe(shared_dim=4),
               dispatch=dict(name='reference'))), **changes)


def batch(seed=0):
  rng = np.random.default_rng(seed)
  segments = (np.arange(6) < np.array([[6], [4]])).astype(np.int32)
  return dict(frames=jnp.array(rng.normal(size=(2, 6, 3)), jnp.float32), segments=jnp.array(segments),
              targets=jnp.array([[1, 2], [3, 0]]), loss_mask=jnp.array([[1., 1.], [1., 0.]]))


@pytest.fixture(scope='module')
def built():
  model = models.build(config())
  return model, *model.init(jax.random.key(0))


def slopes(built, loss):
  model, params, state = built
  return flatten(jax.jit(jax.grad(lambda params: loss(model.apply(params, state, batch()))))(params))


def test_no_gradient_comes_from_the_routers_to_the_shared_network(built):
  objective = objectives.build(dict(name='ctc', shared=0.), 'objective')
  def loss(output):
    return objective(output, batch())[0] + objective.router_loss(output)
  gradients = slopes(built, loss)
  assert all((np.asarray(leaf) == 0).all() for path, leaf in gradients.items() if path.startswith('shared/'))
  # The routers do see it: their kernels have rows for it, which learn.
  kernels = [np.asarray(leaf) for path, leaf in gradients.items() if path.endswith('router/score/kernel')]
  assert len(kernels) == 2 and all((kernel[:4] != 0).any() and kernel.shape == (4 + 8, 4) for kernel in kernels)


def test_its_own_head_trains_the_shared_network_by_the_coefficient_and_nothing_else_does(built):
  def gradients(shared):
    objective = objectives.build(dict(name='ctc', shared=shared), 'objective')
    return slopes(built, lambda output: objective(output, batch())[0])
  none, some, twice = gradients(0.), gradients(0.01), gradients(0.02)
  for path in none:
    if path.startswith('shared/'):
      np.testing.assert_allclose(twice[path], 2 * some[path], rtol=1e-4, atol=1e-9)
    else:
      np.testing.assert_allclose(some[path], none[path], rtol=1e-5, atol=1e-7)
  assert (np.asarray(some['shared/embedding/kernel']) != 0).any()


def test_routing_depends_on_the_shared_network(built):
  model, params, state = built
  other = {**params, 'shared': jax.tree.map(lambda leaf: leaf + jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape),
                                            params['shared'])}
  one, other = (model.apply(tree, state, batch()).routers['block_00'].metrics['entropy'] for tree in (params, other))
  assert abs(float(one - other)) > 1e-4


def test_padding_is_not_heard(built):
  model, params, state = built
  one = batch()
  other = {**one, 'frames': jnp.where(one['segments'][..., None] > 0, one['frames'], 100.)}
  one, other = (model.apply(params, state, each) for each in (one, other))
  for a, b in ((one.logits, other.logits), (one.extras['shared_logits'], other.extras['shared_logits'])):
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1, :4], b[1, :4])


def test_a_dense_model_without_a_shared_network_is_a_plain_encoder():
  model = models.build(config(shared=None, moe=None, sparse=dict(name='none')))
  output = model.apply(*model.init(jax.random.key(0)), batch())
  assert output.logits.shape == (2, 6, 4) and output.extras == {} and output.routers == {}


def test_experts_in_the_shared_network_are_refused():
  with pytest.raises(ConfigError, match='config.model.shared.moe: SharedNetwork has no such key'):
    models.build(config(shared=dict(SHARED, moe={})))
