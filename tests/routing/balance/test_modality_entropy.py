"""Entropy losses of LIMoE: values derived by hand, the parameters each modality's loss can change, and refusals.

By hand: the entropy of the uniform distribution over E experts is log E; of one of which S experts share equally, log S.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ConfigError
from moejax.routing import router, stages
from moejax.routing.balance.modality_entropy import global_entropy, local_entropy
from moejax.routing.inputs import RouterInputs

E = 8
IMAGES, TEXT = 0, 1


def certain(experts):
  """Logits <float32>[1,S,E] with which each token is sent to one expert, with probability 1 in float32."""
  return 200. * jax.nn.one_hot(jnp.array([experts]), E)


def everything(logits):
  return jnp.ones(logits.shape[:2], bool)


def test_entropies_and_thresholds_are_those_derived_by_hand():
  uniform, one, three = jnp.zeros((1, 6, E)), certain([2] * 6), certain([0, 3, 5, 5, 3, 0])
  cases = [  # logits, H(p_t), H(mean p_t)
      (uniform, np.log(E), np.log(E)), (one, 0, 0), (three, 0, np.log(3))]
  for logits, local, of_mean in cases:
    members = everything(logits)
    assert float(local_entropy(logits, members)) == pytest.approx(local, abs=1e-6)
    # S = E: the loss without its threshold.
    assert float(global_entropy(logits, members, E)) == pytest.approx(np.log(E) - of_mean, abs=1e-6)
  # Three experts equally used: nothing is asked for at S = 3, and log 4 - log 3 at S = 4.
  assert float(global_entropy(three, everything(three), 3)) == pytest.approx(0, abs=1e-6)
  assert float(global_entropy(three, everything(three), 4)) == pytest.approx(np.log(4 / 3), abs=1e-6)


def test_losses_equal_a_float64_loop_over_tokens_and_groups():
  logits = jax.random.normal(jax.random.key(0), (3, 7, E))
  members = jax.random.bernoulli(jax.random.key(1), 0.6, (3, 7)).at[2].set(False)  # a group without the modality
  local, of_groups = [], []
  for group, chosen in zip(np.asarray(logits, np.float64), np.asarray(members)):
    probs = [np.exp(row) / np.exp(row).sum() for row in group[chosen]]
    if probs:
      mean = sum(probs) / len(probs)
      local.append(np.mean([-(p * np.log(p)).sum() for p in probs]))
      of_groups.append(max(0, np.log(7.5) + (mean * np.log(mean)).sum()))
  assert max(of_groups) > 0
  assert float(local_entropy(logits, members)) == pytest.approx(np.mean(local), rel=1e-6)
  assert float(global_entropy(logits, members, 7.5)) == pytest.approx(np.mean(of_groups), rel=1e-5)


def routed(logits, modalities):
  return stages.Routed(scores=stages.Scores(logits, logits, logits), probs=jax.nn.softmax(logits), plan=None,
                          valid=everything(logits), inputs=RouterInputs(modalities=modalities))


def build(**entry):
  return router.balancers(entry, 'balance', num_experts=E, k=1, noisy=True)


@pytest.mark.parametrize('entry, other', [
    (dict(global_entropy=dict(coefficient=1., image_experts=8.)), TEXT),
    (dict(global_entropy=dict(coefficient=1., text_experts=8.)), IMAGES),
    (dict(local_entropy=dict(coefficient=1., modalities=('image',))), TEXT),
    (dict(local_entropy=1.), IMAGES)])  # of text alone unless asked for more
def test_the_loss_of_one_modality_does_not_move_the_tokens_of_the_other(entry, other):
  modalities = jnp.array([[IMAGES, IMAGES, TEXT, IMAGES, TEXT, TEXT]])
  balancer, = build(**entry).values()
  slope = jax.grad(lambda logits: balancer.loss(routed(logits, modalities)))(
      jax.random.normal(jax.random.key(0), (1, 6, E)))
  of_other = np.asarray(modalities == other)
  assert (np.asarray(slope)[of_other] == 0).all()
  assert (np.asarray(slope)[~of_other] != 0).any()


def test_slopes_are_finite_where_probabilities_underflow():
  logits = certain([0, 0, 0])
  for loss in (local_entropy, lambda *args: global_entropy(*args, 4)):
    assert np.isfinite(jax.grad(loss)(logits, everything(logits))).all()


@pytest.mark.parametrize('entry, sentence', [
    (dict(local_entropy=dict(coefficient=1., modalities=('sound',))), "modalities must be .* one of 'image', 'text'"),
    (dict(global_entropy=dict(coefficient=1.)), 'set image_experts, text_experts or both'),
    (dict(global_entropy=dict(coefficient=1., text_experts=9.)), 'must be between 1 and num_experts = 8')])
def test_what_cannot_be_asked_for_is_refused(entry, sentence):
  with pytest.raises(ConfigError, match=sentence):
    build(**entry)


def test_a_model_that_does_not_say_what_its_tokens_are_is_refused():
  config = dict(score=dict(name='linear'), select=dict(name='top_k', k=1), balance=dict(local_entropy=1.))
  built = router.build(config, 'router', dim=4, num_experts=2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='RouterInputs.modalities is None'):
    built(jnp.ones((1, 3, 4)), RouterInputs())
