"""Feed-forward experts equal their formulas in float64, in every layout; weights start as documented."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import experts, functional
from moejax.config import ConfigError
from moejax.experts.layouts import Buffers, Ragged
from moejax.layers.feed_forwards.dense import DenseFeedForward

E, N, D, F = 3, 4, 5, 6


def build(dim=D, num_experts=E, dtype=jnp.float32, **config):
  config = dict(name='feed_forward', hidden=F) | config
  return functional.functionalize(lambda rngs: experts.build(
      config, 'config.experts', dim=dim, num_experts=num_experts, dtype=dtype, rngs=rngs))


def random_params(layer, seed=0):
  """Normal values for every parameter, biases included."""
  leaves, tree = jax.tree.flatten(layer.shapes()[0])
  rng = np.random.RandomState(seed)
  return jax.tree.unflatten(tree, [jnp.asarray(rng.randn(*leaf.shape), jnp.float32) for leaf in leaves])


def gelu(x):
  """Hendrycks & Gimpel 2016, section 2: the tanh approximation."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
  return x / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


FORMULAS = {
    'gelu': lambda x, gate: gelu(x),
    'relu': lambda x, gate: relu(x),
    'silu': lambda x, gate: silu(x),
    'squared_relu': lambda x, gate: relu(x)**2,
    'geglu': lambda x, gate: gelu(gate) * x,
    'reglu': lambda x, gate: relu(gate) * x,
    'swiglu': lambda x, gate: silu(gate) * x,
}


def formula(params, e, rows, activation, use_bias):
  """Rows through expert `e` (None: without expert axis) in float64."""
  p = {name: np.asarray(value, np.float64) for name, value in params.items()}
  p = p if e is None else {name: value[e] for name, value in p.items()}
  bias = lambda name: p[name] if use_bias else 0.
  rows = np.asarray(rows, np.float64)
  gate = rows @ p['wg'] + bias('bg') if 'wg' in p else None
  return FORMULAS[activation](rows @ p['wi'] + bias('bi'), gate) @ p['wo'] + bias('bo')


@pytest.mark.parametrize('use_bias', [False, True])
@pytest.mark.parametrize('activation', FORMULAS)
def test_equals_its_formula_in_buffers_in_sorted_rows_and_dense(activation, use_bias):
  layer = build(activation=activation, use_bias=use_bias)
  params = random_params(layer)
  rows = np.random.RandomState(1).randn(E, N, D).astype(np.float32)
  expected = np.stack([formula(params, e, rows[e], activation, use_bias) for e in range(E)])
  # Squared ReLU reaches hundreds; sums of 30 products in float32.
  close = dict(rtol=0, atol=30 * 2**-24 * abs(expected).max())

  np.testing.assert_allclose(layer.apply(params, {}, rows, Buffers(row_ids=None)), expected, **close)

  # Expert 0 gets all its rows, expert 1 none, expert 2 two; the rest belongs to none.
  ragged = Ragged(expert=jnp.array([0] * N + [2, 2] + [E] * 2), group_sizes=jnp.array([N, 0, 2]), row_ids=None)
  y = layer.apply(params, {}, np.concatenate([rows[0], rows[2]]), ragged)
  np.testing.assert_allclose(y[:N + 2], np.concatenate([expected[0], expected[2, :2]]), **close)

  dense = functional.functionalize(lambda rngs: DenseFeedForward(
      dim=D, hidden=F, activation=activation, use_bias=use_bias, dtype=jnp.float32, rngs=rngs))
  own = {name: value[1] for name, value in params.items()}
  np.testing.assert_allclose(dense.apply(own, {}, rows)[0], formula(own, None, rows, activation, use_bias), **close)


def test_parameters_their_shapes_and_logical_axes():
  layer = build(activation='swiglu', use_bias=True)
  assert {name: leaf.shape for name, leaf in layer.shapes()[0].items()} == dict(
      wi=(E, D, F), wg=(E, D, F), wo=(E, F, D), bi=(E, F), bg=(E, F), bo=(E, D))
  assert layer.axes == dict(
      wi=('expert', 'expert_embed', 'expert_mlp'), wg=('expert', 'expert_embed', 'expert_mlp'),
      wo=('expert', 'expert_mlp', 'expert_embed'), bi=('expert', 'expert_mlp'), bg=('expert', 'expert_mlp'),
      bo=('expert', 'expert_embed'))
  assert set(build(activation='gelu').shapes()[0]) == {'wi', 'wo'}
  dense = build(num_experts=None, use_bias=True)
  assert dense.axes == dict(wi=('embed', 'mlp'), wo=('mlp', 'embed'), bi=('mlp',), bo=('embed',))
  assert dense.shapes()[0]['wi'].shape == (D, F)


def test_parameters_are_float32_and_the_computation_is_not():
  layer = build(dtype=jnp.bfloat16)
  params, _ = layer.init(jax.random.key(0))
  assert params['wi'].dtype == jnp.float32
  assert layer.apply(params, {}, jnp.ones((E, N, D)), Buffers(row_ids=None)).dtype == jnp.bfloat16


@pytest.mark.parametrize('init_scale', [1., 0.1])
def test_weights_start_with_variance_scale_over_the_fan_in_of_one_expert(init_scale):
  params, _ = build(dim=64, num_experts=8, hidden=32, use_bias=True, init_scale=init_scale).init(jax.random.key(0))
  for name, fan_in in dict(wi=64, wo=32).items():
    # 16384 samples: the standard deviation of their standard deviation is below 1/sqrt(2*16384) = 0.6%.
    np.testing.assert_allclose(params[name].std(), math.sqrt(init_scale / fan_in), rtol=0.03)
    # Truncated at two standard deviations of the normal, which has 1/0.8796 times the variance scaling's.
    assert abs(params[name]).max() <= 2.001 * math.sqrt(init_scale / fan_in) / 0.87962566
  assert not params['bi'].any() and not params['bo'].any()


def test_experts_start_different_or_identical():
  for init, same in dict(independent=False, identical=True).items():
    params, _ = build(init=init, activation='geglu').init(jax.random.key(0))
    for w in params.values():
      assert bool((w[0] == w[1]).all()) is same
    assert (params['wi'] != params['wg']).any()


def test_dropout_zeroes_hidden_units_at_its_rate_and_keeps_the_mean():
  hidden, rate = 1000, 0.3
  layer = build(hidden=hidden, dropout=rate, activation='relu')
  # Hidden units are all 1, and expert e's output is their mean.
  params = dict(wi=jnp.ones((E, D, hidden)) / D, wo=jnp.ones((E, hidden, D)) / hidden)
  rows, ids = jnp.ones((E, N, D)), jnp.arange(E * N).reshape(E, N)
  run = lambda key, train: layer.apply(params, {}, rows, Buffers(ids), key=key, train=train)
  y = run(jax.random.key(0), True)
  # The mean over 12 rows of 1000 kept/0.7: standard deviation sqrt(0.3/0.7/12000) = 0.6%.
  np.testing.assert_allclose(y[..., 0].mean(), 1., atol=0.03)
  assert len(np.unique(y[..., 0])) > 6  # rows draw masks of their own
  np.testing.assert_allclose(run(None, False), 1., rtol=1e-5)  # 1000 additions
  np.testing.assert_array_equal(y, run(jax.random.key(0), True))
  with pytest.raises(ValueError, match='key'):
    run(None, True)


@pytest.mark.parametrize('config, message', [
    (dict(activation='glu'), 'config.experts.activation must be one of'),
    (dict(hiden=3), "config.experts.hiden: .* Did you mean 'hidden'"),
    (dict(dropout=1.), r'config.experts.dropout must be a float of at least 0 and below 1, not 1\.0'),
    (dict(hidden=0), 'config.experts.hidden must be an int of at least 1'),
    (dict(num_experts=2), 'config.experts.num_experts'),
    (dict(name='mlp'), "no expert 'mlp'"),
])
def test_configs_that_do_not_fit_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    config = dict(name='feed_forward', hidden=F) | config
    functional.functionalize(lambda rngs: experts.build(
        config, 'config.experts', dim=D, num_experts=E, dtype=jnp.float32, rngs=rngs))
