"""Optimizers are optax's of that name; schedules go through points computed by hand; decay finds kernels by axes."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from training_fakes import MODEL

from moejax.config import ConfigError
from moejax.functional import Functional, flatten
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.training import optimizer

CONSTANT = dict(name='constant', peak=0.1)


def build(config, steps=100, model=MODEL):
  return optimizer.build(config, 'config.optimizer', model=model, steps=steps)


def model_of(parameters):
  """A `Functional` with parameters only: {path: (shape, axes)}."""
  shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in parameters.items()}
  tree = optimizer.unflatten(shapes)
  return Functional(init=lambda key: (jax.tree.map(lambda s: jnp.zeros(s.shape), tree), {}), apply=None,
                    axes=optimizer.unflatten({path: axes for path, (_, axes) in parameters.items()}), state_axes={})


# ---- schedules ------------------------------------------------------------------------------------------------------

# Peak 0.8 after 10 warm-up steps of 110: half-way of the rest is step 60, three quarters step 85.
SCHEDULES = [
    (dict(name='constant', peak=0.8, warmup=10), {0: 0., 5: 0.4, 10: 0.8, 60: 0.8, 110: 0.8}),
    (dict(name='linear', peak=0.8, warmup=10), {0: 0., 10: 0.8, 60: 0.4, 85: 0.2, 110: 0.}),
    (dict(name='linear', peak=0.8, warmup=10, end=0.4), {10: 0.8, 60: 0.6, 85: 0.5, 110: 0.4, 500: 0.4}),
    # cosine: (1 + cos(pi/2)) / 2 = 1/2, (1 + cos(3 pi/4)) / 2 = (1 - 1/sqrt 2) / 2
    (dict(name='cosine', peak=0.8, warmup=10), {5: 0.4, 10: 0.8, 60: 0.4, 85: 0.4 * (1 - 0.5**0.5), 110: 0., 500: 0.}),
    (dict(name='cosine', peak=0.8, end=0.2), {0: 0.8, 55: 0.5, 110: 0.2}),
    # rsqrt: step 40 is four times the warm-up, so half the peak; step 90 a third
    (dict(name='rsqrt', peak=0.8, warmup=10), {5: 0.4, 10: 0.8, 40: 0.4, 90: 0.8 / 3}),
    # without warm-up 1 / sqrt(step), from step 1 on
    (dict(name='rsqrt', peak=0.8, warmup=0), {0: 0.8, 1: 0.8, 4: 0.4, 16: 0.2, 100: 0.08}),
    # with 20 steps of cool-down, step 100 has half of peak / sqrt(10)
    (dict(name='rsqrt', peak=0.8, warmup=10, cooldown=20), {40: 0.4, 90: 0.8 / 3, 100: 0.4 / 10**0.5, 110: 0.}),
]


@pytest.mark.parametrize('config, points', SCHEDULES)
def test_schedules_pass_through_points_computed_by_hand(config, points):
  schedule = build(dict(name='sgd', schedule=config), steps=110).schedule
  found = schedule(jnp.array(list(points)))
  np.testing.assert_allclose(found, list(points.values()), rtol=1e-6, atol=1e-8)  # float32


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


# ---- weight decay ---------------------------------------------------------------------------------------------------

PARAMETERS = {  # path: (shape, axes), and whether it decays by default
    'embedding/table': (((9, 4), ('vocab', 'embed')), True),
    'position_embedding/table': (((6, 4), (None, 'embed')), False),
    'encoding/table': (((6, 4), (None, 'embed')), False),
    'lengths/table': (((6, 4), ('length', 'embed')), False),
    'patches/kernel': (((6, 4), (None, 'embed')), True),
    'class_token': (((1, 4), (None, 'embed')), False),
    'blocks/norm/scale': (((2, 4), ('layers', 'embed')), False),
    'blocks/attention/query': (((2, 4, 3, 2), ('layers', 'embed', 'heads', 'head_dim')), True),
    'blocks/attention/offset': (((2, 3, 2), ('layers', 'heads', 'head_dim')), False),
    'blocks/attention/out': (((2, 1, 4, 4), ('layers', 'heads', 'head_dim', 'embed')), True),
    'blocks/moe/router/kernel': (((2, 4, 5), ('layers', 'embed', 'expert')), True),
    'blocks/moe/experts/wi': (((2, 5, 4, 8), ('layers', 'expert', 'embed', 'mlp')), True),
    'blocks/moe/experts/offset': (((2, 5, 8), ('layers', 'expert', 'mlp')), False),
    'one/experts/offset': (((5, 8), ('expert', 'mlp')), False),
    'head/bias': (((9,), ('vocab',)), False),
}


def test_by_default_kernels_and_word_embeddings_decay_and_stacked_vectors_do_not():
  model = model_of({path: parameter for path, (parameter, _) in PARAMETERS.items()})
  mask = flatten(optimizer.decay_mask(model, None, 'here'))
  assert mask == {path: decays for path, (_, decays) in PARAMETERS.items()}


def test_a_regular_expression_says_which_parameters_decay():
  model = model_of({path: parameter for path, (parameter, _) in PARAMETERS.items()})
  mask = flatten(optimizer.decay_mask(model, r'experts/|head/', 'here'))
  assert {path for path, decays in mask.items() if decays} == {
      'blocks/moe/experts/wi', 'blocks/moe/experts/offset', 'one/experts/offset', 'head/bias'}


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


# ---- sharding, averages, statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(OPTAX))
def test_optimizer_state_is_sharded_as_the_parameters_it_mirrors(name):
  keys = OPTAX[name][0]
  transform = build(dict(name=name, schedule=CONSTANT, clip=1., **keys)).transform
  mesh = mesh_lib.build(dict(data=2, expert=2, model=2))
  params, _ = MODEL.shapes()
  sharded = rules.shardings(mesh, MODEL.axes, params)
  found = optimizer.state_shardings(transform, params, sharded, rules.replicated(mesh))
  shapes = jax.eval_shape(transform.init, params)
  assert jax.tree.structure(found) == jax.tree.structure(shapes)
  # every leaf can be sharded so, and those of the experts' shape are spread over experts
  for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(found)):
    sharding.shard_shape(leaf.shape)
    if leaf.shape == (4, 3, 8):
      assert sharding == sharded['wi'] and sharding.spec[0] == 'expert'


def test_factors_of_adafactor_are_sharded_like_their_dimensions():
  params = dict(wi=jax.ShapeDtypeStruct((4, 256, 512), jnp.float32))
  mesh = mesh_lib.build(dict(data=1, expert=2, fsdp=2, model=2))
  sharded = rules.shardings(mesh, dict(wi=('expert', 'expert_embed', 'expert_mlp')), params)
  transform = optax.scale_by_factored_rms()
  found = optimizer.state_shardings(transform, params, sharded, rules.replicated(mesh))
  shapes = jax.eval_shape(transform.init, params)
  specs = {shapes.v_row['wi'].shape: found.v_row['wi'].spec, shapes.v_col['wi'].shape: found.v_col['wi'].spec}
  assert specs == {(4, 256): PartitionSpec('expert', 'fsdp'), (4, 512): PartitionSpec('expert', 'model')}


def test_the_moving_average_follows_its_recursion():
  # From 1 with decay 0.5: 0.5*1 + 0.5*3 = 2, then 0.5*2 + 0.5*5 = 3.5.
  average = optimizer.moving_average({'a': jnp.float32(1)}, {'a': jnp.float32(3)}, 0.5)
  assert average['a'] == 2.
  assert optimizer.moving_average(average, {'a': jnp.float32(5)}, 0.5)['a'] == 3.5


def test_gradient_norms_are_reported_by_module():
  tree = {'a': {'wi': jnp.array([3., 0.]), 'wo': jnp.array([[4.]])}, 'head': jnp.array([2.])}
  norms = optimizer.norms_by_module(tree)
  assert {name: float(norm) for name, norm in norms.items()} == {'a': 5., 'head': 2.}


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
