"""Residual experts equal fairseq's formula in float64, in every layout, and start as the identity.

The formula is that of BASE layers (2103.16716): a stack of `x <- x + W2 relu(W1 LN(x) + b1) + b2`, mixed by the layer
around it as `a F(x) + (1-a) x`.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import experts, functional
from moejax.config import ConfigError, call
from moejax.experts.layouts import Buffers, Dense, Ragged
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers

E, N, D, F = 3, 4, 5, 6


def build(num_experts=E, **config):
  config = dict(name='residual_stack', hidden=F, sublayers=2) | config
  return functional.functionalize(lambda rngs: experts.build(
      config, 'config.experts', dim=D, num_experts=num_experts, dtype=jnp.float32, rngs=rngs))


def random_params(layer):
  rng = np.random.RandomState(0)
  return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.7, leaf.shape)), layer.shapes()[0])


def update(params, e, rows):
  """`F_e(x) - x` in float64."""
  stream = np.asarray(rows, np.float64)
  for depth in range(len(params['sublayers'])):
    p = {name: np.asarray(leaf, np.float64)[e] for name, leaf in params['sublayers'][str(depth)].items()}
    centred = stream - stream.mean(-1, keepdims=True)
    normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    hidden = np.maximum((normalised * p['norm_scale'] + p['norm_bias']) @ p['wi'] + p['bi'], 0)
    stream = stream + hidden @ p['wo'] + p['bo']
  return stream - np.asarray(rows, np.float64)


CLOSE = dict(rtol=0, atol=2e-5)  # float32 sums of tens of terms of order one to ten


def test_equals_the_stack_of_its_sublayers_in_buffers_in_sorted_rows_and_dense():
  layer = build()
  params = random_params(layer)
  rows = np.random.RandomState(1).randn(E, N, D).astype(np.float32)
  expected = np.stack([update(params, e, rows[e]) for e in range(E)])
  np.testing.assert_allclose(layer.apply(params, {}, rows, Buffers(row_ids=None)), expected, **CLOSE)

  # Expert 0 gets all its rows, expert 1 none, expert 2 two; the rest belongs to none.
  ragged = Ragged(expert=jnp.array([0] * N + [2, 2] + [E] * 2), group_sizes=jnp.array([N, 0, 2]), row_ids=None)
  y = layer.apply(params, {}, np.concatenate([rows[0], rows[2]]), ragged)
  np.testing.assert_allclose(y[:N + 2], np.concatenate([expected[0], expected[2, :2]]), **CLOSE)

  own = jax.tree.map(lambda leaf: leaf[1], params)
  np.testing.assert_allclose(build(num_experts=None).apply(own, {}, rows[1], Dense()), expected[1], **CLOSE)


def test_each_expert_has_a_norm_of_its_own_and_starts_as_the_identity():
  layer = build()
  assert layer.axes['sublayers']['1'] == dict(
      norm_scale=('expert', 'expert_embed'), norm_bias=('expert', 'expert_embed'), bi=('expert', 'expert_mlp'),
      wi=('expert', 'expert_embed', 'expert_mlp'), wo=('expert', 'expert_mlp', 'expert_embed'),
      bo=('expert', 'expert_embed'))
  params, _ = layer.init(jax.random.key(0))
  assert params['sublayers']['0']['wi'].any()
  assert not layer.apply(params, {}, jnp.ones((E, N, D)), Buffers(row_ids=None)).any()


@pytest.mark.parametrize('dispatch', ['reference', 'gather', 'grouped'])
def test_added_to_its_input_the_layer_mixes_the_expert_with_the_identity(dispatch):
  """`a F(x) + (1-a) x` with fairseq's names: a is the combine weight, and 0 where the token is dropped."""
  config = dict(num_experts=E, experts=dict(name='residual_stack', hidden=F), dispatch=dict(name=dispatch),
                router=papers.switch(capacity_factor=0.5, eval_capacity_factor=None))
  layer = functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)
  params = random_params(layer)
  x = np.random.RandomState(1).randn(2, 12, D).astype(np.float32)
  y, output = jax.jit(lambda params, x: layer.apply(params, {}, x))(params, x)
  alpha = np.asarray(output.plan.to_dense().weight.reshape(2, 12, E), np.float64)
  assert (alpha.sum(-1) == 0).any()
  of_expert = np.stack([x + update(params['experts'], e, x) for e in range(E)], axis=2)
  mixed = (alpha[..., None] * of_expert).sum(2) + (1 - alpha.sum(-1, keepdims=True)) * x
  np.testing.assert_allclose(x + y, mixed, **CLOSE)


def test_a_stack_of_nothing_is_refused():
  with pytest.raises(ConfigError, match='config.experts.sublayers must be an int from 1 to 32, not 0'):
    build(sublayers=0)
