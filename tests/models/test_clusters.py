"""The mixture of filters of "Towards Understanding MoE" against a loop in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.routing import papers

B, E, CLASSES, FILTERS = 5, 3, 2, 4
IMAGES = np.random.default_rng(0).normal(size=(B, 4, 4, 1)).astype(np.float32)


def build(**changes):
  return models.build(dict(
      name='patch_mixture', image_size=4, patch_size=2, num_classes=CLASSES, moe=dict(
          num_experts=E, experts=dict(filters=FILTERS), router=papers.understanding_moe())) | changes)


def parameters(model):
  generator = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), model.shapes()[0])


@pytest.mark.parametrize('activation, power', [('cubic', 3), ('linear', 1)])
@pytest.mark.parametrize('output', ['probabilities', 'logits'])
def test_the_model_equals_a_loop_in_float64(activation, power, output):
  moe = dict(num_experts=E, experts=dict(filters=FILTERS, activation=activation), router=papers.understanding_moe())
  model = build(moe=moe, output=output)
  params = parameters(model)
  out = jax.jit(lambda params, batch: model.apply(params, {}, batch))(params, dict(image=jnp.asarray(IMAGES)))
  layer = jax.tree.map(lambda a: np.asarray(a, np.float64), params['blocks']['0']['moe'])
  kernel, bias, gate = layer['experts']['kernel'], layer['experts']['bias'], layer['router']['score']['kernel']
  for image in range(B):
    patches = [IMAGES[image, i:i + 2, j:j + 2, 0].astype(np.float64).ravel() for i in (0, 2) for j in (0, 2)]
    h = sum(patches) @ gate
    e = h.argmax()
    scores = [h[e] * sum((kernel[e, :, y, j] @ patch + bias[e, y, j])**power for patch in patches
                         for j in range(FILTERS)) for y in range(CLASSES)]
    np.testing.assert_allclose(out.features[image], scores, rtol=1e-4, atol=1e-3)
    if output == 'probabilities':
      scores = np.exp(np.array(scores) - max(scores)) / np.exp(np.array(scores) - max(scores)).sum()
    np.testing.assert_allclose(out.logits[image], scores, rtol=1e-3, atol=1e-3)
  assert out.routers['block_00'].plan.expert.shape == (1, B, 1)


def test_training_adds_noise_from_0_to_1_to_the_logits_that_also_weigh():
  model = build()
  params = jax.tree.map(jnp.zeros_like, parameters(model))
  images = jnp.zeros((4000, 4, 4, 1))
  plan = jax.jit(lambda params: model.apply(params, {}, dict(image=images), key=jax.random.key(0), train=True)
                 .routers['block_00'].plan)(params)
  # The weight is the largest of three uniform draws: mean 3/4, variance 3/80; each expert has it equally often.
  weight = np.asarray(plan.weight)
  assert weight.mean() == pytest.approx(0.75, abs=4 * (3 / 80 / 4000)**0.5) and 0 < weight.min() and weight.max() < 1
  np.testing.assert_allclose(np.bincount(np.asarray(plan.expert).ravel()) / 4000, 1 / 3, atol=0.03)


def test_filters_start_as_a_small_convolution_of_pytorch_and_the_router_at_zero():
  model = build(moe=dict(num_experts=E, experts=dict(filters=500), router=papers.understanding_moe()))
  layer = jax.jit(model.init)(jax.random.key(0))[0]['blocks']['0']['moe']
  np.testing.assert_array_equal(layer['router']['score']['kernel'], 0)
  for leaf in layer['experts'].values():  # uniform within 1e-3 / sqrt(4)
    assert np.abs(leaf).max() <= 5e-4 and np.std(leaf) == pytest.approx(5e-4 / 3**0.5, rel=0.03)


def test_padding_is_not_routed():
  model = build()
  valid = jnp.asarray([True, True, False, True, False])
  plan = model.apply(parameters(model), {}, dict(image=jnp.asarray(IMAGES), valid=valid)).routers['block_00'].plan
  np.testing.assert_array_equal(plan.kept[0, :, 0], valid)


def test_patches_must_tile_the_image():
  with pytest.raises(ConfigError, match='patch_size must be .* that divides image_size, not 3'):
    build(patch_size=3)
