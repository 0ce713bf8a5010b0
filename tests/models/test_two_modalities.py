"""The tower of two modalities: shared parameters, and that tokens compete for experts but do not attend."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.models.two_modalities import with_success
from moejax.routing import papers
from moejax.routing.plans import TokenPlan
from moejax.routing.router import RouterOutput

B, PATCHES, WORDS = 4, 4, 3


def config(capacity_factor=1.05, **changes):
  router = papers.limoe(capacity_factor=capacity_factor, image_experts=3., text_experts=2.)
  router['place']['convention'] = 'moejax'
  return dict(dict(
      name='two_modalities', image_size=4, patch_size=2, channels=1, vocab_size=9, text_length=WORDS, dim=8,
      embedding_dim=5, num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=8),
      sparse=dict(name='layers', indices=(1,)),
      moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=router,
               dispatch=dict(name='gather'))), **changes)


def batch(seed=0):
  rng = np.random.default_rng(seed)
  segments = np.ones((B, WORDS), np.int32)
  segments[1, 2:] = 0
  return dict(image=jnp.array(rng.normal(size=(B, 4, 4, 1)), jnp.float32), segments=jnp.array(segments),
              tokens=jnp.array(rng.integers(9, size=(B, WORDS)), jnp.int32), valid=jnp.ones(B, bool))


def only(batch, *names):
  return {name: batch[name] for name in names}


def compiled(config):
  model = models.build(config)
  return *jax.jit(model.init)(jax.random.key(0)), jax.jit(model.apply)


@pytest.fixture(scope='module')
def roomy():
  """For a model whose experts are never full: parameters, state and compiled evaluation."""
  return compiled(config(capacity_factor=8.))


def test_logits_are_the_scaled_products_of_unit_vectors(roomy):
  params, state, apply = roomy
  output = apply(params, state, batch())
  image, text = (np.asarray(output.extras[name], np.float64) for name in ('image', 'text'))
  for vectors in (image, text):
    np.testing.assert_allclose((vectors**2).sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(output.logits, 10 * image @ text.T, rtol=1e-4, atol=1e-5)  # scale 10 at the start


def test_an_image_does_not_attend_to_its_text_nor_the_text_to_it(roomy):
  params, state, apply = roomy
  one, other = batch(0), batch(1)
  both = apply(params, state, one)
  other_text = apply(params, state, {**one, 'tokens': other['tokens']})
  other_image = apply(params, state, {**one, 'image': other['image']})
  np.testing.assert_allclose(both.extras['image'], other_text.extras['image'], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(both.extras['text'], other_image.extras['text'], rtol=1e-5, atol=1e-6)
  assert not np.allclose(both.extras['text'], other_text.extras['text'], atol=1e-3)


def test_each_modality_alone_is_encoded_as_in_a_pair(roomy):
  params, state, apply = roomy
  both = apply(params, state, batch())
  image = apply(params, state, only(batch(), 'image', 'valid'))
  text = apply(params, state, only(batch(), 'tokens', 'segments', 'valid'))
  np.testing.assert_allclose(both.extras['image'], image.extras['image'], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(both.extras['text'], text.extras['text'], rtol=1e-4, atol=1e-5)
  assert set(image.extras) == {'image'} and image.logits.size == 0


def test_padded_words_change_nothing(roomy):
  params, state, apply = roomy
  one = batch()
  one, other = (apply(params, state, {**one, 'tokens': one['tokens'].at[1, 2].set(word)}) for word in (1, 2))
  jax.tree.map(np.testing.assert_array_equal, (one.extras, one.logits, one.features),
               (other.extras, other.logits, other.features))


def test_tokens_of_both_modalities_share_one_group_and_its_capacity():
  params, state, apply = compiled(config(capacity_factor=0.5))
  router = apply(params, state, batch()).routers['block_01']
  tokens = B * (PATCHES + WORDS)
  assert router.plan.expert.shape[:2] == (1, tokens)
  assert router.plan.capacity == np.ceil(0.5 * tokens / 4)
  # All success is that of the choices of the router; of the 28 tokens one is padding.
  images, words = B * PATCHES, B * WORDS - 1
  served = router.metrics['image_success'] * images + router.metrics['text_success'] * words
  assert float(served) == pytest.approx((1 - float(router.metrics['dropped'])) * (images + words), rel=1e-5)


def test_success_is_the_share_of_a_modalitys_tokens_that_are_computed():
  kept = jnp.array([[True, True, False, False], [True, False, True, True]])[..., None]
  plan = TokenPlan(expert=jnp.zeros((2, 4, 1), jnp.int32), weight=jnp.ones((2, 4, 1)), kept=kept, num_experts=2)
  router = RouterOutput(plan=plan, losses={}, metrics={}, updates={})
  modalities = jnp.array([[0, 0, 0, 1]] * 2)
  valid = jnp.array([[True, True, True, True], [True, True, True, False]])
  metrics = with_success(router, modalities, valid).metrics
  assert float(metrics['image_success']) == pytest.approx(4 / 6)
  assert float(metrics['text_success']) == 0  # the one computed text token is padding


def test_sizes_that_do_not_fit_are_refused():
  with pytest.raises(ConfigError, match='patch_size must be .* that divides image_size, not 3'):
    models.build(config(patch_size=3))
  with pytest.raises(ConfigError, match='scale must be a float above 0'):
    models.build(config(scale=0.))
