"""The vision transformer: patches by a loop, pooling, initial values, and images that are only padding."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.models.vision import patchify
from moejax.routing import papers

IMAGES = jnp.float32(np.random.default_rng(0).normal(size=(2, 8, 8, 1)))


def test_patchify_equals_cutting_patches_one_by_one():
  images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  expected = [[images[b, row:row + 2, column:column + 2].ravel() for row in (0, 2) for column in (0, 2, 4)]
              for b in range(2)]
  np.testing.assert_array_equal(patchify(jnp.asarray(images), 2), expected)


@pytest.mark.parametrize('pool', ['gap', 'token', 'map'])
@pytest.mark.parametrize('positions', ['learned', 'sincos2d'])
def test_pooling_and_positions(pool, positions):
  model = models.build(tiny.vision(pool=pool, positions=dict(name=positions)))
  params, state = model.shapes()
  output = jax.eval_shape(model.apply, params, state, dict(image=IMAGES))
  assert output.logits.shape == (2, 5) and output.features.shape == (2, 8)
  tokens = 4 + (pool == 'token')
  assert ('encoding' in params) == (positions == 'learned')
  if positions == 'learned':
    assert params['encoding']['table'].shape == (tokens, 8)


def test_without_positions_the_order_of_patches_does_not_matter():
  _, params, state, apply = tiny.initialised(tiny.vision(positions=dict(name='none')))
  features = lambda image: apply(params, state, dict(image=image)).features
  upside_down = jnp.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)
  np.testing.assert_allclose(features(IMAGES), features(upside_down), atol=1e-5)  # sums in another order


def test_the_head_starts_at_zero_with_the_bias_of_rare_classes():
  model = models.build(tiny.vision(head_bias='-log(num_classes)', num_layers=1))
  params = jax.jit(lambda key: model.init(key)[0]['head'])(jax.random.key(0))
  np.testing.assert_array_equal(params['kernel'], np.zeros((8, 5)))
  np.testing.assert_allclose(params['bias'], [-np.log(5)] * 5, rtol=1e-6)


def test_padding_images_change_nothing_for_the_others():
  # Batch priority and one group: without `valid` the second image would compete for slots.
  router = papers.vmoe(k=2, capacity_factor=1., priority='batch')
  _, params, state, apply = tiny.initialised(tiny.vision(router))
  features = lambda image: apply(params, state, dict(image=image, valid=jnp.asarray([True, False]))).features
  np.testing.assert_array_equal(features(IMAGES)[0], features(IMAGES.at[1].mul(9.))[0])


def test_soft_moe_with_qk_norm_mixes_tokens_of_one_image_only():
  moe = tiny.moe(papers.soft_moe(), dispatch=dict(name='einsum'), group='sequence')
  attention = dict(heads=2, qk_norm=dict(name='layer_norm', use_bias=False))
  config = tiny.vision(moe=moe, sparse=dict(name='top', n=1), attention=attention)
  _, params, state, apply = tiny.initialised(config)
  assert 'blocks/0/attention/query_norm/scale' in flatten(params)
  features = lambda image: apply(params, state, dict(image=image)).features
  np.testing.assert_allclose(features(IMAGES)[0], features(IMAGES.at[1].mul(9.))[0], atol=1e-6)


def test_stochastic_depth_grows_from_zero_at_the_first_block():
  _, params, state, apply = tiny.initialised(tiny.vision(num_layers=1, stochastic_depth=0.9))
  train, evaluate = (apply(params, state, dict(image=IMAGES), key=key, train=train).features
                     for key, train in ((jax.random.key(0), True), (None, False)))
  np.testing.assert_allclose(train, evaluate, rtol=1e-6)


def test_images_of_another_size_are_refused_before_compilation():
  model = models.build(tiny.vision())
  with pytest.raises(ConfigError, match=r'config.model: images have shape \(8, 4, 1\), but the model expects \(8, 8, 1\)'):
    jax.eval_shape(model.apply, *model.shapes(), dict(image=IMAGES[:, :, :4]))


def test_patches_must_tile_the_image():
  with pytest.raises(ConfigError, match='patch_size must be .* that divides image_size, not 3'):
    models.build(tiny.vision(patch_size=3))
