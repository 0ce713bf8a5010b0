"""Shares of a sum, however small it is."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing.balance.imbalance import imbalance
from moejax.routing.logits import normalized, router_probs


def test_router_probabilities_are_gates_over_their_sum_with_slots_added_up():
  np.testing.assert_allclose(router_probs(jnp.array([[[.2, .6]]])), [[[.25, .75]]], rtol=1e-6)
  np.testing.assert_allclose(router_probs(jnp.array([[[[.1, .2], [.3, .4]]]])), [[[.3, .7]]], rtol=1e-6)


@pytest.mark.parametrize('size', [1e-36, 1e-25, 1., 1e25])
def test_quotients_by_a_sum_do_not_depend_on_its_size(size):
  values = np.array([.2, .5, .1, 0.])
  towards = np.array([1., -2., .5, 3.])
  shares = values / values.sum()
  slopes = (towards - towards @ shares) / values.sum()
  found = lambda v: normalized(v * jnp.float32(size))
  np.testing.assert_allclose(found(jnp.float32(values)), shares, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(lambda v: found(v) @ towards)(jnp.float32(values)), slopes, rtol=1e-5)


def test_a_balance_loss_of_tiny_weights_equals_that_of_ordinary_weights():
  weights = jnp.array([1., 2., 3., 2.])
  one_token = jnp.ones((1, 1), bool)
  loss = lambda size: jax.value_and_grad(lambda w: imbalance(size * w[None], one_token))(weights)
  for found, expected in zip(loss(1e-23), loss(1.)):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert float(loss(1.)[0]) == pytest.approx(.5 / 4)  # variance 1/2, mean 2


def test_scaling_changes_no_bit_of_a_quotient():
  values = jax.random.uniform(jax.random.key(0), (1000, 7))
  np.testing.assert_array_equal(normalized(values), values / values.sum(-1, keepdims=True))
