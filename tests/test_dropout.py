"""Dropout: dropped and kept entries, and when it does nothing."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.random import dropout

X = jnp.ones((64, 8, 8))
KEY = jax.random.key(0)


def test_entries_are_zero_or_scaled_and_the_mean_stays():
  y = dropout(X, 0.25, key=KEY, train=True)
  np.testing.assert_allclose(np.unique(y), [0., 4 / 3], rtol=1e-6)
  # 4096 independent entries of standard deviation sqrt(0.25 / 0.75) = 0.58: the mean's is 0.009; 5 of them.
  assert abs(y.mean() - 1) < 0.045


def test_stochastic_depth_drops_whole_examples():
  y = dropout(X, 0.5, key=KEY, train=True, shared_axes=(1, 2))
  assert all(example.min() == example.max() for example in y) and set(np.unique(y)) == {0., 2.}


def test_outside_training_nothing_happens_even_with_a_key():
  assert dropout(X, 0.5, key=KEY, train=False) is X
  assert dropout(X, 0., key=None, train=True) is X


def test_training_needs_a_key():
  with pytest.raises(ValueError, match='needs a key'):
    dropout(X, 0.5, key=None, train=True)


def test_a_traced_rate_of_zero_keeps_all():
  np.testing.assert_array_equal(jax.jit(lambda rate: dropout(X, rate, key=KEY, train=True))(0.), X)
