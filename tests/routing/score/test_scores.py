"""Scores against float64 products, the definitions of the noises, and counting for draws."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing import papers
from moejax.routing.stages import SCORES

G, S, D, E = 2, 5, 8, 4
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (G, S, D))


def build(dim=D, num_experts=E, **config):
  return SCORES.build(config, 'config.score', dim=dim, num_experts=num_experts, rngs=nnx.Rngs(0))


def test_linear_scores_are_a_product_with_a_kernel_and_nothing_else():
  score = build(name='linear', init_std=1.)
  out = score(X, key=None, train=False)
  expected = np.asarray(X, np.float64) @ np.asarray(score.kernel[...], np.float64)
  # float32 sums of 8 products of size 1: a few units in the last place.
  np.testing.assert_allclose(out.logits, expected, rtol=0, atol=1e-5)
  assert out.select is out.logits and out.clean is out.logits and out.noise_std is None


def test_a_bias_starts_at_zero_and_is_added():
  score = build(name='linear', bias=True)
  without = score(X, key=None, train=False).logits
  score.bias[...] = jnp.arange(4.)
  added = score(X, key=None, train=False).logits - without
  np.testing.assert_allclose(added, np.broadcast_to(np.arange(4.), (G, S, E)), rtol=0, atol=1e-6)


# Glorot's deviation is sqrt(2 / (D + E)).
@pytest.mark.parametrize('init_std, expected', [
    (0.02, 0.02), (0., 0.), ('1/sqrt(D)', 1 / 16), ('torch_linear', 1 / 16 / 3**0.5),
    ('xavier', (2 / (256 + 64))**0.5), ('xavier/2', (2 / (256 + 64))**0.5 / 2)])
def test_the_kernel_starts_with_the_configured_standard_deviation(init_std, expected):
  kernel = build(name='linear', dim=256, num_experts=64, init_std=init_std).kernel[...]
  # 16,384 draws: the sample deviation is within 3% (more than five standard errors) of the true one.
  assert float(kernel.std()) == pytest.approx(expected, rel=0.03, abs=1e-9)


def test_a_gate_that_starts_as_torch_s_linear_is_uniform_within_one_over_root_d():
  score = build(name='linear', dim=64, num_experts=512, init_std='torch_linear', bias=True)
  for values in (score.kernel[...], score.bias[...]):
    values = np.sort(np.ravel(values)) * 8
    # 512 uniform draws or more: their distribution is off by 0.09 (Kolmogorov) once in a thousand times.
    np.testing.assert_allclose(values, np.linspace(-1, 1, len(values)), atol=0.18)
    assert np.abs(values).max() <= 1


@pytest.mark.parametrize('name, gate', [('deepspeed', {}), ('fastmoe', dict(gate='switch')), ('fastmoe', {}),
                                        ('fastmoe_swipe', {}), ('lucidrains', {})])
def test_gates_of_torch_codebases_start_as_torch_s_linear(name, gate):
  fragment = getattr(papers, name)(**gate)
  score = SCORES.build(fragment['score'], 'score', dim=64, num_experts=64, rngs=nnx.Rngs(0))
  kernel = np.asarray(score.kernel[...])
  assert np.abs(kernel).max() <= 1 / 8
  assert kernel.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)  # 4,096 draws
  if name.startswith('fastmoe'):
    assert np.abs(score.bias[...]).max() <= 1 / 8 and np.std(score.bias[...]) > 0.05


def test_slots_of_soft_moe_start_as_long_as_one_over_root_e():
  """google-research/vmoe: lecun normal of [D,E,C], whose fan-in counts experts too."""
  phi = np.asarray(build(name='soft_moe', dim=64, num_experts=8, slots=32).phi[...])
  assert phi.std() == pytest.approx((64 * 8)**-0.5, rel=0.03)


@pytest.mark.parametrize('noise_std, expected', [('1/E', 1 / 64), (0.5, 0.5)])
def test_noise_is_added_to_logits_and_selection_but_not_to_clean_logits(noise_std, expected):
  score = build(name='linear', num_experts=64, noise_std=noise_std)
  x = jax.random.normal(KEY, (4, 64, D))
  out = score(x, key=KEY, train=True)
  np.testing.assert_array_equal(out.clean, score(x, key=None, train=False).logits)
  noise = np.asarray(out.logits - out.clean)
  assert noise.std() == pytest.approx(expected, rel=0.03)
  assert out.select is out.logits
  assert float(out.noise_std) == pytest.approx(expected)


def test_jitter_multiplies_the_features_within_its_bounds():
  score = build(name='linear', dim=1, num_experts=1, init_std=1., jitter=0.01)
  x = jnp.ones((1, 4096, 1))
  ratio = np.asarray(score(x, key=KEY, train=True).logits / score(x, key=None, train=False).logits)
  # Uniform on [0.99, 1.01]: deviation 0.01/sqrt(3).
  assert 0.99 <= ratio.min() < 0.9902 and 1.0098 < ratio.max() <= 1.01 + 1e-6
  assert ratio.std() == pytest.approx(0.01 / 3**0.5, rel=0.05)


@pytest.mark.parametrize('config', [dict(name='linear', noise_std='1/E'), dict(name='linear', jitter=0.1),
                                    dict(name='linear', dropout=0.1), dict(name='linear', logit_jitter=0.1),
                                    dict(name='random')])
def test_noise_needs_a_key_in_training_and_none_at_evaluation(config):
  score = build(**config)
  with pytest.raises(ValueError, match='draws random numbers in training'):
    score(X, key=None, train=True)
  first, second = (score(X, key=key, train=False).logits for key in (None, KEY))
  np.testing.assert_array_equal(first, second)


def test_soft_moe_logits_are_scaled_cosines():
  score = build(name='soft_moe', slots=3)
  score.scale[...] = jnp.float32(2.5)
  x, phi = np.asarray(X, np.float64), np.asarray(score.phi[...], np.float64)
  norms = np.linalg.norm(x, axis=-1)[:, :, None, None] * np.linalg.norm(phi, axis=0)
  expected = 2.5 * np.einsum('gsd,dec->gsec', x, phi) / norms
  # The 1e-6 inside the roots changes unit-size norms by less than 1e-6, here up to 1e-5 of the logits.
  np.testing.assert_allclose(score(X, key=None, train=False).logits, expected, rtol=0, atol=2e-5)


def test_soft_moe_logits_do_not_depend_on_the_length_of_a_token():
  score = build(name='soft_moe')
  short, long = (score(factor * X, key=None, train=False).logits for factor in (1., 100.))
  np.testing.assert_allclose(short, long, rtol=0, atol=2e-6)


def test_hash_scores_make_the_hashed_expert_certain():
  score = build(name='hash', dim=None, vocab_size=10, table='modulo')
  logits = score(jnp.array([[0, 5, 9]]), key=None, train=True).logits
  np.testing.assert_array_equal(jax.nn.softmax(logits), jax.nn.one_hot(jnp.array([[0, 1, 1]]), E))
  assert np.isfinite(logits).all()


def test_random_scores_make_every_expert_equally_likely():
  logits = build(name='random')(jnp.zeros((1, 4096, D)), key=KEY, train=True).logits
  counts = np.bincount(np.asarray(logits.argmax(-1)).ravel(), minlength=E)
  # Binomial(4096, 1/4): mean 1024, deviation 28; five of them.
  assert abs(counts - 1024).max() < 140


@pytest.mark.parametrize('config, message', [
    (dict(name='linear', dim=None), r"config\.score: needs vectors"),
    (dict(name='hash', dim=D, vocab_size=4), r"config\.score: 'hash' needs token ids"),
    (dict(name='hash', dim=None, vocab_size=4, frequencies=(1., 2.)), r'config\.score\.frequencies'),
    (dict(name='hash', dim=None, vocab_size=4, table='balanced', frequencies=(1., 2.)), r'one for each of the 4 ids'),
    (dict(name='hash', dim=None, vocab_size=4, table='sorted'), r"one of 'random', 'balanced', 'modulo'"),
    (dict(name='hash', dim=None), r'config\.score\.vocab_size is missing'),
    (dict(name='linear', noise_std='1/K'), r"config\.score\.noise_std must be a float of at least 0 or one of '1/E'"),
    (dict(name='linear', dropout=1.), r'config\.score\.dropout must be a float of at least 0 and below 1'),
    (dict(name='soft_moe', slots=0), r'config\.score\.slots must be an int of at least 1, not 0'),
])
def test_scores_that_cannot_be_built_say_where_and_why(config, message):
  with pytest.raises(ConfigError, match=message):
    build(**config)
