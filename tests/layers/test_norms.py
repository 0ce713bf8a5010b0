"""Norms against their formulas in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers.norms import NORMS

X = np.random.default_rng(0).normal(3., 2., (2, 3, 8))


def build(**config):
  norm = NORMS.build(config, 'norm', dim=8, axis='embed', rngs=nnx.Rngs(0))
  norm.scale[...] = jnp.arange(1., 9.)
  return norm


def test_layer_norm():
  norm = build(name='layer_norm', epsilon=1e-3)
  norm.bias[...] = jnp.arange(8.)
  expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-3) * np.arange(1, 9) + np.arange(8)
  np.testing.assert_allclose(norm(jnp.float32(X)), expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_rms_norm_takes_off_no_mean():
  norm = build(name='rms_norm', epsilon=1e-3)
  expected = X / np.sqrt((X ** 2).mean(-1, keepdims=True) + 1e-3) * np.arange(1, 9)
  np.testing.assert_allclose(norm(jnp.float32(X)), expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['layer_norm', 'rms_norm'])
def test_bfloat16_activations_have_float32_statistics(name):
  norm, x = build(name=name), jnp.asarray(X * 100, jnp.bfloat16)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  # Everything but the last rounding is what float32 makes of the same numbers.
  np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_parameters_are_float32_with_axes():
  for leaf in jax.tree.leaves(nnx.state(build(name='layer_norm')), is_leaf=lambda v: isinstance(v, nnx.Variable)):
    assert leaf.dtype == jnp.float32 and leaf.get_metadata()['axes'] == ('embed',)
