"""Attention against a loop over batch, heads and queries in float64, and its special cases against one another."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.attend import Mask, attend
from moejax.layers.mixers.attention import Attention, SelfAttention
from moejax.layers.norms import LayerNorm
from moejax.layers.positions import NoPositions
from moejax.layers.sublayer import Context
from moejax.routing.inputs import RouterInputs

RNG = np.random.default_rng(0)
B, S, T, H, N, K, D = 2, 4, 5, 4, 2, 3, 8


@jax.jit
def apply(attention, *args, **kwargs):
  return attention.read(*args, **kwargs)


def arrays(*shapes):
  return [jnp.float32(RNG.normal(size=shape)) for shape in shapes]


def build(dtype=jnp.float32, **config):
  return call(Attention, config, 'config.model.attention', dim=D, dtype=dtype, rngs=nnx.Rngs(0))


def loop(queries, keys, values, scale, mask, bias):
  queries, keys, values = (np.asarray(a, np.float64) for a in (queries, keys, values))
  out = np.zeros(queries.shape)
  for b, s, h in np.ndindex(*queries.shape[:3]):
    head = h // (queries.shape[2] // keys.shape[2])
    logits = np.asarray([queries[b, s, h] @ keys[b, t, head] * scale + bias[b, h, s, t] for t in range(keys.shape[1])])
    weights = np.where(mask[b, 0, s], np.exp(logits - logits.max()), 0)
    out[b, s, h] = weights / weights.sum() @ values[b, :, head]
  return out


@pytest.mark.parametrize('kv_heads', [1, N, H])
def test_attend_equals_the_loop(kv_heads):
  q, k, v, bias = arrays((B, S, H, K), (B, T, kv_heads, K), (B, T, kv_heads, K), (B, H, S, T))
  mask = Mask(jnp.asarray(RNG.integers(1, 3, (B, S))), jnp.asarray(np.append(RNG.integers(1, 3, (B, T - 2)), [[1, 2]] * B, 1)))
  np.testing.assert_allclose(attend(q, k, v, scale=0.3, mask=mask, bias=bias), loop(
      q, k, v, 0.3, np.asarray(mask.dense(S, T)), np.asarray(bias)), atol=1e-5)  # float32 sums of 5 terms


def test_grouped_queries_equal_multi_head_with_repeated_keys_and_values():
  grouped, full = build(heads=H, kv_heads=N), build(heads=H)
  full.query[...], full.out[...] = grouped.query[...], grouped.out[...]
  full.key[...] = jnp.repeat(grouped.key[...], H // N, axis=1)
  full.value[...] = jnp.repeat(grouped.value[...], H // N, axis=1)
  x, = arrays((B, S, D))
  np.testing.assert_allclose(apply(grouped, x), apply(full, x), atol=1e-6)  # the same sums in another order


def test_cross_attention_of_a_sequence_to_itself_is_self_attention():
  attention, (x,) = build(heads=2, use_bias=True), arrays((B, S, D))
  np.testing.assert_array_equal(apply(attention, x), apply(attention, x, x))


def test_qk_norm_of_all_heads_normalises_them_together():
  of_heads = build(heads=2, kv_heads=1, qk_norm=dict(name='rms_norm', epsilon=0.), qk_norm_of='all_heads')
  assert of_heads.query_norm.scale.shape == (D,) and of_heads.key_norm.scale.shape == (D // 2,)
  x, = arrays((B, S, D))
  queries = np.einsum('bsd,dhk->bshk', x, of_heads.query[...]).astype(np.float64)
  expected = queries / np.sqrt(np.square(queries).mean((2, 3), keepdims=True))  # 2409.02060, table 11
  np.testing.assert_allclose(of_heads.queries(x), expected, atol=1e-6)


@pytest.mark.parametrize('use_bias, biased', [
    (False, ()), (True, ('query', 'key', 'value', 'out')), (('query', 'key', 'value'), ('query', 'key', 'value'))])
def test_each_projection_may_have_a_bias(use_bias, biased):
  attention = build(heads=2, use_bias=use_bias)
  assert [name for name in ('query', 'key', 'value', 'out') if getattr(attention, f'{name}_bias') is not None] == [*biased]


def test_a_window_sinks_and_a_cap_reach_the_logits():
  """The keys of the config; what they mean is tested where attention is computed."""
  x, = arrays((1, S, D))
  sees = lambda **config: np.asarray(jax.jacobian(lambda x: SelfAttention.__call__(
      call(SelfAttention, dict(heads=1, **config), 'a', dim=D, dtype=jnp.float32, rngs=nnx.Rngs(0)), x, Context(
          RouterInputs(), NoPositions(), mask=Mask(causal=True)))[0])(x)).any((0, 2, 3, 5))
  np.testing.assert_array_equal(sees(), np.tril(np.ones((S, S))))
  np.testing.assert_array_equal(sees(window=2), np.tril(np.ones((S, S))) - np.tril(np.ones((S, S)), -2))
  plain, sunk, capped = build(heads=1), build(heads=1, sinks=True), build(heads=1, cap=1e-6)
  sunk.sinks[...] = jnp.full(1, 1e4)
  assert np.abs(apply(plain, x)).max() > 0.1 and not apply(sunk, x).any()  # all weight goes to the sink
  mean = np.einsum('bsd,dhk,hke->bse', x, capped.value[...], capped.out[...]).mean(1, keepdims=True)
  np.testing.assert_allclose(apply(capped, x), np.broadcast_to(mean, x.shape), atol=1e-5)  # all logits are 0


def test_qk_norm_makes_queries_and_keys_insensitive_to_the_scale_of_their_kernels():
  attention, (x,) = build(heads=2, qk_norm=dict(name='layer_norm', use_bias=False, epsilon=0.)), arrays((B, S, D))
  assert isinstance(attention.query_norm, LayerNorm) and attention.query_norm.scale.shape == (D // 2,)
  before = apply(attention, x)
  attention.query[...], attention.key[...] = attention.query[...] * 7, attention.key[...] * 0.1
  np.testing.assert_allclose(apply(attention, x), before, atol=1e-5)


def test_without_scaling_queries_start_smaller_by_as_much():
  scaled, unscaled = build(heads=2, head_dim=16), build(heads=2, head_dim=16, scale='none')
  np.testing.assert_allclose(unscaled.query[...] * 4, scaled.query[...], rtol=1e-6)
  x, = arrays((B, S, D))
  np.testing.assert_allclose(apply(unscaled, x), apply(scaled, x), atol=1e-6)


def test_kernels_start_with_the_variance_of_their_own_fan_in():
  attention = call(Attention, dict(heads=8, head_dim=16), 'a', dim=256, dtype=jnp.float32, rngs=nnx.Rngs(0))
  # 32768 samples: the relative error of a standard deviation is about 1/sqrt(2 * 32768) = 0.004.
  assert np.std(attention.value[...]) == pytest.approx(256 ** -0.5, rel=0.02)
  assert np.std(attention.out[...]) == pytest.approx((8 * 16) ** -0.5, rel=0.02)


def test_dropout_drops_weights_in_training_only():
  attention, (x,) = build(heads=2, dropout=0.5), arrays((B, S, D))
  key = jax.random.key(0)
  np.testing.assert_array_equal(attention.read(x, key=key), attention.read(x))
  assert not np.allclose(attention.read(x, key=key, train=True), attention.read(x))


def test_bfloat16_computes_the_softmax_in_float32_and_returns_bfloat16():
  attention, (x,) = build(heads=2, dtype=jnp.bfloat16), arrays((B, S, D))
  assert attention.read(x).dtype == jnp.bfloat16 and attention.query.dtype == jnp.float32
  q, k, v = (a.astype(jnp.bfloat16) for a in arrays((B, S, 1, K), (B, T, 1, K), (B, T, 1, K)))
  jaxpr = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, scale=1.))(q, k, v))
  assert not any('exp' in line and 'bf16' in line for line in jaxpr.splitlines())


def test_parameters_carry_logical_axes():
  axes = functional.functionalize(
      lambda rngs: call(Attention, dict(heads=2, use_bias=True), 'a', dim=D, dtype=jnp.float32, rngs=rngs)).axes
  assert axes['query'] == ('embed', 'heads', 'head_dim') and axes['key'] == ('embed', 'kv_heads', 'head_dim')
  assert axes['out'] == ('heads', 'head_dim', 'embed') and axes['query_bias'] == ('heads', 'head_dim')


@pytest.mark.parametrize('config, message', [
    (dict(heads=4, kv_heads=3), 'kv_heads must be .* that divides heads'),
    (dict(heads=3), 'heads.*divisor'),
    (dict(heads=2, scale='half'), "scale must be one of 'sqrt', 'none'"),
    (dict(heads=2, qk_norms=None), "Did you mean 'qk_norm'"),
])
def test_configs_that_cannot_be_built_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    build(**config)
