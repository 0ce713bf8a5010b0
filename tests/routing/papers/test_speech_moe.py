"""Losses of SpeechMoE at their extremes and against float64 loops, and what its routers see.

By hand: a one-hot p has |p|_2 = 1 and so L_s = 1; uniform p has |p|_2 = 1/sqrt(E), L_s = sqrt(E). If the mean of p is
uniform, L_m = E * E * (1/E)^2 = 1; if it is one-hot, E.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.speech_moe import mean_importance_loss, sparsity_loss
from moejax.routing.stages import FEATURES

E = 4
BALANCED = jnp.eye(E)[None].repeat(2, axis=1)
UNIFORM = jnp.full((1, 8, E), 1 / E)
COLLAPSED = jnp.eye(E)[None, [1] * 8]


@pytest.mark.parametrize('probs, sparsity, importance', [
    (BALANCED, 1, 1), (UNIFORM, np.sqrt(E), 1), (COLLAPSED, 1, E)], ids=['balanced', 'uniform', 'collapsed'])
def test_both_losses_at_their_extremes(probs, sparsity, importance):
  valid = jnp.ones(probs.shape[:2], bool)
  # E is a power of 4, and so is every product exact.
  assert float(sparsity_loss(probs, valid)) == sparsity
  assert float(mean_importance_loss(probs, valid)) == importance


def test_both_losses_equal_a_loop_over_the_valid_tokens_of_all_groups():
  probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 5, E)))
  valid = jnp.arange(5) < jnp.array([[5], [2], [0]])
  tokens = [np.asarray(p, np.float64) for p, counts in zip(probs.reshape(-1, E), valid.reshape(-1)) if counts]
  sparsity = np.mean([abs(p / np.sqrt((p**2).sum())).sum() for p in tokens])
  importance = E * (np.mean(tokens, axis=0)**2).sum()
  assert float(sparsity_loss(probs, valid)) == pytest.approx(sparsity, rel=1e-6)
  assert float(mean_importance_loss(probs, valid)) == pytest.approx(importance, rel=1e-6)


def test_groups_that_are_each_collapsed_are_balanced_together():
  probs = jnp.eye(E)[:, None].repeat(3, axis=1)  # group e uses expert e alone
  assert float(mean_importance_loss(probs, jnp.ones((E, 3), bool))) == 1


def test_routers_see_the_shared_output_before_the_activations():
  feature = FEATURES.build(dict(name='with_shared', shared_dim=3), 'features', dim=2)
  x, shared = jnp.ones((1, 4, 2), jnp.bfloat16), 2 * jnp.ones((1, 4, 3), jnp.bfloat16)
  seen = feature(x, RouterInputs(shared=shared))
  np.testing.assert_array_equal(seen[0, 0], [2, 2, 2, 1, 1])
  assert feature.width == 5 and seen.dtype == jnp.float32


def test_a_router_may_omit_the_shared_output():
  feature = FEATURES.build(dict(name='with_shared', shared_dim=0), 'features', dim=2)
  x = jnp.ones((1, 4, 2))
  np.testing.assert_array_equal(feature(x, RouterInputs()), x)


def test_a_width_is_needed_and_a_shared_network_too():
  with pytest.raises(ConfigError, match='shared_dim is missing'):
    FEATURES.build(dict(name='with_shared'), 'features', dim=2)
  feature = FEATURES.build(dict(name='with_shared', shared_dim=3), 'features', dim=2)
  with pytest.raises(ValueError, match='RouterInputs.shared is None'):
    feature(jnp.ones((1, 4, 2)), RouterInputs())
  with pytest.raises(ConfigError, match='shared_dim is 3, but the shared network has width 4'):
    feature(jnp.ones((1, 4, 2)), RouterInputs(shared=jnp.ones((1, 4, 4))))
