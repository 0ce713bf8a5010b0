"""The speech model: the shared network's loss and users, and that padding has no effect."""
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
  return *jax.jit(model.init)(jax.random.key(0)), jax.jit(model.apply)


@pytest.fixture(scope='module')
def slopes(built):
  """Gradients of what training minimises, part by part: `{part: {path: array}}`."""
  params, state, apply = built
  objective = objectives.build(dict(name='ctc'), 'objective')
  def parts(params):
    output = apply(params, state, batch())
    _, metrics = objective(output, batch())
    return {**metrics, 'router_loss': objective.router_loss(output)}
  return {part: flatten(tree) for part, tree in jax.jit(jax.jacrev(parts))(params).items()}


def moves(gradients, shared):
  """Whether anything in the shared network, or beside it, has a gradient."""
  return any((np.asarray(leaf) != 0).any() for path, leaf in gradients.items()
             if path.startswith('shared_network/') == shared)


def test_no_gradient_comes_from_the_routers_to_the_shared_network(slopes):
  assert set(slopes) == {'ctc_loss', 'shared_ctc_loss', 'router_loss'}
  for part in ('ctc_loss', 'router_loss'):
    assert moves(slopes[part], shared=False) and not moves(slopes[part], shared=True)
    # The routers do see it: their kernels have rows for it, which learn.
    kernels = [np.asarray(leaf) for path, leaf in slopes[part].items() if path.endswith('router/score/kernel')]
    assert len(kernels) == 2 and all((kernel[:4] != 0).any() and kernel.shape == (4 + 8, 4) for kernel in kernels)


def test_its_own_head_alone_trains_the_shared_network(slopes):
  assert moves(slopes['shared_ctc_loss'], shared=True) and not moves(slopes['shared_ctc_loss'], shared=False)


def test_routing_depends_on_the_shared_network(built):
  params, state, apply = built
  changed = jax.tree.map(lambda leaf: leaf + jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params['shared_network'])
  other = {**params, 'shared_network': changed}
  one, other = (apply(tree, state, batch()).routers['block_00'].metrics['entropy'] for tree in (params, other))
  assert abs(float(one - other)) > 1e-4


def test_padding_is_not_heard(built):
  params, state, apply = built
  one = batch()
  other = {**one, 'frames': jnp.where(one['segments'][..., None] > 0, one['frames'], 100.)}
  one, other = (apply(params, state, each) for each in (one, other))
  for a, b in ((one.logits, other.logits), (one.extras['shared_logits'], other.extras['shared_logits'])):
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1, :4], b[1, :4])


def test_a_dense_model_without_a_shared_network_is_a_plain_encoder():
  model = models.build(config(shared=None, moe=None, sparse=dict(name='none')))
  output = jax.eval_shape(model.apply, *model.shapes(), batch())
  assert output.logits.shape == (2, 6, 4) and output.extras == {} and output.routers == {}


def test_experts_in_the_shared_network_are_refused():
  with pytest.raises(ConfigError, match='config.model.shared.moe: SharedNetwork has no such key'):
    models.build(config(shared=dict(SHARED, moe={})))
