"""LoRA: nothing changes at the start, and what was learned can be added to the weights; however blocks are run."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten, unflatten
from moejax.layers.views import merge_lora
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.routing import papers

TOKENS = np.random.default_rng(0).integers(1, 30, (8, 6), np.int32)
MOE = dict(num_experts=4, experts=dict(name='feed_forward', hidden=8, activation='swiglu'),
           router=papers.top_k_dropless(k=2), dispatch=dict(name='grouped'))
LORA = dict(name='lora', rank=2, alpha=4., of='attention/(query|key|value|out)|moe/experts/w.|moe/router/score/kernel|feed_forward/w.')
RUNS = [dict(), dict(stacking='scan'), dict(remat='full'), dict(stacking='scan', remat='dots')]
# Scan and remat each alone repeat what both together show.
by_run = pytest.mark.parametrize('run', [
    pytest.param(run, id=name, marks=[pytest.mark.slow] if len(run) == 1 else [])
    for run, name in zip(RUNS, ['unrolled', 'scan', 'remat', 'scan and remat'])])
by_two = pytest.mark.parametrize('run', [RUNS[0], RUNS[3]], ids=['unrolled', 'scan and remat'])


def decoder(view=None, stacking='unrolled', **config):
  return models.build(dict(name='decoder', vocab_size=30, dim=8, num_layers=4 if stacking == 'scan' else 2, stacking=stacking,
                           attention=dict(heads=2),
                           feed_forward=dict(hidden=12), moe=MOE, sparse=dict(name='every', n=2), view=view, **config))


def learned(params):
  """As after training: no B is zero."""
  return unflatten({path: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape) if path.endswith('/b') else leaf
                    for path, leaf in flatten(params).items()})


@functools.cache
def built(run):
  plain, viewed = decoder(**dict(run)), decoder(LORA, **dict(run))
  params, _ = jax.jit(viewed.init)(jax.random.key(0))
  return plain, viewed, params


@by_run
def test_adapters_change_nothing_at_the_start(run):
  plain, viewed, params = built(tuple(run.items()))
  own, _ = plain.shapes()
  base = {name: tree for name, tree in params.items() if name != 'views'}
  assert flatten(base).keys() == flatten(own).keys() and len(flatten(params['views'])) >= 20
  out = [jax.jit(model.apply)(tree, {}, dict(tokens=TOKENS)).logits for model, tree in ((plain, base), (viewed, params))]
  np.testing.assert_array_equal(*out)


@by_two
def test_merged_weights_compute_what_adapters_compute(run):
  plain, viewed, params = built(tuple(run.items()))
  params = learned(params)
  expected = jax.jit(viewed.apply)(params, {}, dict(tokens=TOKENS)).logits
  merged = merge_lora(params, alpha_over_rank=2.)
  found = jax.jit(plain.apply)(merged, {}, dict(tokens=TOKENS)).logits
  assert np.abs(found - jax.jit(plain.apply)({k: v for k, v in params.items() if k != 'views'}, {}, dict(tokens=TOKENS)).logits).max() > 0.01
  np.testing.assert_allclose(found, expected, atol=1e-5)  # the same float32 sums, fused differently


def test_an_adapter_is_a_product_in_the_shape_of_its_weight():
  """Against the definition, for a weight with experts and one with heads, in float64."""
  _, _, params = built(())
  params = learned(params)
  flat = {path: np.float64(leaf) for path, leaf in flatten(params).items()}
  merged = flatten(merge_lora(params, 2.))
  a, b = flat['views/1/moe/experts/wi/a'], flat['views/1/moe/experts/wi/b']
  expected = flat['blocks/1/moe/experts/wi'] + np.stack([2. * a[e] @ b[e] for e in range(4)])
  np.testing.assert_allclose(merged['blocks/1/moe/experts/wi'], expected, atol=1e-6)
  a, b = flat['views/0/attention/out/a'], flat['views/0/attention/out/b']
  assert a.shape == (2 * 4, 2) and b.shape == (2, 8)
  np.testing.assert_allclose(merged['blocks/0/attention/out'], flat['blocks/0/attention/out'] + 2. * (a @ b).reshape(2, 4, 8), atol=1e-6)


@by_two
def test_gradients_reach_adapters_through_the_weights(run):
  """dL/dB = scale * A^T dL/dW, where dL/dW is that of the merged model."""
  plain, viewed, params = built(tuple(run.items()))
  params = learned(params)
  loss = lambda model: lambda params: jnp.square(model.apply(params, {}, dict(tokens=TOKENS)).logits).mean()
  own = flatten(jax.jit(jax.grad(loss(viewed)))(params))
  of_weights = flatten(jax.jit(jax.grad(loss(plain)))(merge_lora(params, 2.)))
  where = '0/0/attention/query' if run.get('stacking') == 'scan' else '0/attention/query'
  weight = np.float64(of_weights[f'blocks/{where}'])
  a = np.float64(flatten(params)[f'views/{where}/a'])
  expected = 2. * np.swapaxes(a, -1, -2) @ weight.reshape(*weight.shape[:-2], -1)
  np.testing.assert_allclose(own[f'views/{where}/b'], expected, atol=1e-6 + 1e-4 * np.abs(expected).max())


def test_adapters_on_a_mesh_compute_what_they_compute_on_one_device():
  _, viewed, params = built((('stacking', 'scan'), ('remat', 'dots')))
  params = learned(params)
  expected = jax.jit(viewed.apply)(params, {}, dict(tokens=TOKENS)).logits
  mesh = mesh_lib.build(dict(data=2, expert=2, model=2))
  placed = jax.device_put(params, rules.shardings(mesh, viewed.axes, params))

  @jax.jit
  def apply(params):
    with rules.use(mesh):
      return viewed.apply(params, {}, dict(tokens=TOKENS)).logits
  np.testing.assert_allclose(apply(placed), expected, atol=1e-5)


@pytest.mark.parametrize('config, message', [
    (dict(view=dict(name='lora', rank=2, of='attention_norm/scale')), r'config.model.view.of = .* is not a matrix'),
    (dict(view=LORA, sparse=dict(name='none'), moe=None, sharing='all'), r"config.model.view: layers with sharing = 'all'"),
])
def test_what_cannot_be_adapted_is_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    models.build(dict(name='decoder', vocab_size=30, dim=8, num_layers=2, attention=dict(heads=2),
                      feed_forward=dict(hidden=12), **{'moe': MOE, **config}))
