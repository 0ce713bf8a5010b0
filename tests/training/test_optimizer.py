"""Optimizers are optax's of that name, with decay, clipping and scaling of gradients as their keys say."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fakes import MODEL

from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.training import optimizer

CONSTANT = dict(name='constant', peak=0.1)


def build(config):
  return optimizer.build(config, 'config.optimizer', model=MODEL, steps=100)


# ---- optimizers -----------------------------------------------------------------------------------------------------

MASK = {'router': True, 'wi': True, 'bias': False, 'head': True}
OPTAX = {
    'adamw': (dict(b2=0.95, weight_decay=0.3), lambda: optax.adamw(0.1, b2=0.95, weight_decay=0.3, mask=MASK)),
    'lion': (dict(weight_decay=0.3), lambda: optax.lion(0.1, weight_decay=0.3, mask=MASK)),
    'sgd': (dict(momentum=0.9), lambda: optax.sgd(0.1, momentum=0.9)),
    'adafactor': (dict(min_dim_size_to_factor=4), lambda: optax.adafactor(0.1, min_dim_size_to_factor=4)),
}


@pytest.mark.parametrize('name', OPTAX)
def test_an_optimizer_returns_the_updates_of_optax(name):
  keys, reference = OPTAX[name]
  ours = build(dict(name=name, schedule=CONSTANT, **keys)).transform
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), MODEL.shapes()[0])
  gradients = jax.tree.map(lambda p: rng.normal(size=(4, *p.shape)).astype(np.float32), params)

  def run(transform):
    def step(carry, gradients):
      params, state = carry
      updates, state = transform.update(gradients, state, params)
      return (optax.apply_updates(params, updates), state), None
    return jax.jit(lambda: jax.lax.scan(step, (params, transform.init(params)), gradients)[0][0])()

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(ours), run(reference()))


def update(transform, gradients, params):
  updates, _ = transform.update(gradients, transform.init(params), params)
  return optax.apply_updates(params, updates)


def test_decay_of_sgd_and_adafactor_is_decoupled():
  # With gradient 0, p <- p - rate * decay * p = p (1 - 0.1 * 0.5), and only where the mask says so.
  params = jax.tree.map(lambda p: jnp.full(p.shape, 2.), MODEL.shapes()[0])
  for name in ('sgd', 'adafactor'):
    transform = build(dict(name=name, schedule=CONSTANT, weight_decay=0.5)).transform
    new = jax.jit(update, static_argnums=0)(transform, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(new['wi'], 1.9, rtol=1e-6)
    np.testing.assert_allclose(new['bias'], 2., rtol=1e-6)


def test_gradients_are_clipped_to_a_global_norm():
  transform = build(dict(name='sgd', schedule=dict(name='constant', peak=1.), clip=1.)).transform
  params = jax.tree.map(lambda p: jnp.zeros(p.shape), MODEL.shapes()[0])
  large = jax.tree.map(jnp.zeros_like, params) | {'router': jnp.zeros((3, 4)).at[0, 0].set(3.),
                                                 'bias': jnp.zeros((4, 8)).at[0, 0].set(4.)}
  new = jax.jit(update, static_argnums=0)(transform, large, params)
  np.testing.assert_allclose(new['router'][0, 0], -3 / 5, rtol=1e-6)  # the norm is sqrt(9 + 16) = 5
  np.testing.assert_allclose(new['bias'][0, 0], -4 / 5, rtol=1e-6)


@pytest.mark.parametrize('config, sentence', [
    (dict(name='adamv', schedule=CONSTANT), "there is no optimizer 'adamv'. Did you mean 'adamw'"),
    (dict(name='adamw', schedule=CONSTANT, b3=1.), 'config.optimizer.b3: adamw has no such key'),
    (dict(name='adamw'), 'config.optimizer.schedule is missing'),
    (dict(name='adamw', schedule=dict(name='cosine', peak=-1.)), 'config.optimizer.schedule.peak must be a float above 0'),
    (dict(name='adamw', schedule=dict(name='cosine', peak=1., warmup=100)), '100 steps of warm-up'),
    (dict(name='adamw', schedule=dict(name='rsqrt', peak=1.)), 'config.optimizer.schedule.warmup is missing'),
    (dict(name='adamw', schedule=CONSTANT, clip=0.), 'config.optimizer.clip must be a float above 0 or None'),
    (dict(name='adamw', schedule=CONSTANT, decay='('), 'is not a regular expression'),
    (dict(name='adamw', schedule=CONSTANT, decay='kernell'), "'kernell' matches no parameter path"),
])
def test_an_invalid_optimizer_is_refused_in_a_sentence(config, sentence):
  with pytest.raises(ConfigError) as error:
    build(config)
  assert sentence in str(error.value)


# ---- scaled gradients -----------------------------------------------------------------------------------------------


def test_the_gradients_of_named_parameters_are_scaled_before_they_are_clipped():
  params = MODEL.init(jax.random.key(0))[0]
  gradients = jax.tree.map(jnp.ones_like, params)
  scaled = jax.tree.map(jnp.ones_like, params) | {'wi': 4 * jnp.ones_like(params['wi'])}
  for clip in (None, 1.0):
    keys = dict(name='sgd', schedule=CONSTANT, clip=clip)
    one = build(dict(keys, gradient_scale=dict(parameters='^wi$', factor=4.))).transform
    other = build(keys).transform
    found, _ = one.update(gradients, one.init(params), params)
    expected, _ = other.update(scaled, other.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'sgd'])
def test_parameters_without_gradient_and_decay_stay_bit_for_bit(name):
  params = MODEL.init(jax.random.key(0))[0]
  transform = build(dict(name=name, schedule=CONSTANT, gradient_scale=dict(parameters='^(?!wi$)', factor=0.))).transform
  state, moved = transform.init(params), params
  for _ in range(2):
    updates, state = transform.update(jax.tree.map(jnp.ones_like, params), state, moved)
    moved = optax.apply_updates(moved, updates)
  assert {path for path, leaf in flatten(moved).items() if (leaf != flatten(params)[path]).any()} == {'wi'}


def test_scales_that_cannot_be_applied_are_refused():
  for scale, message in ((dict(parameters='nothing', factor=2.), "parameters: 'nothing' matches no parameter path"),
                         (dict(parameters='wi', factor=-1.), 'gradient_scale.factor must be a float of at least 0'),
                         (dict(parameters='wi'), 'gradient_scale.factor is missing')):
    with pytest.raises(ConfigError, match=message):
      build(dict(name='sgd', schedule=CONSTANT, gradient_scale=scale))
