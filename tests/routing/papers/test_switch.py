"""Switch Transformer's explorations and overflow, against frequencies and numbers by hand."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs

G, S, E = 2, 8, 4
KEY = jax.random.key(0)


def switch(values, **options):
  """papers.switch on tokens whose features are their logits; 2 slots for 8 tokens and 4 experts."""
  config = papers.switch(capacity_factor=1., eval_capacity_factor=None, **options)
  config = config | dict(place=config['place'] | dict(min_capacity=0))
  built = functional.functionalize(lambda rngs: router.build(config, 'router', dim=E, num_experts=E, rngs=rngs))
  return jax.jit(functools.partial(built.apply, train=True))(dict(score=dict(kernel=jnp.eye(E))), {}, values,
                                                             RouterInputs(), key=KEY)


def test_no_token_is_left_behind_with_enough_slots_and_all_experts_as_fallbacks():
  values = jax.random.normal(KEY, (G, S, E)) + 2 * jnp.arange(E)  # nearly all prefer the last expert
  dropped, retry = (switch(values, exploration='argmax', overflow=overflow) for overflow in ('drop', 'retry'))
  assert dropped.metrics['dropped'] > 0.5 and retry.metrics['dropped'] == 0
  np.testing.assert_array_equal(dropped.metrics['load'], retry.metrics['load'])  # demand: first choices
  # The weight is the probability of the expert that a token ends at.
  weight, probs = retry.plan.to_dense().weight, jax.nn.softmax(values, axis=-1)
  assert (jnp.sum(weight > 0, -1) == 1).all()
  np.testing.assert_allclose(weight.sum(-1), jnp.where(weight > 0, probs, 0).sum(-1), rtol=1e-5)


def test_switch_max_keeps_the_choices_of_highest_probability():
  values = jnp.zeros((1, S, E)).at[0, :, 1].set(jnp.arange(1., S + 1))
  kept = np.asarray(switch(values, overflow='least_probable').plan.kept)[0, :, 0]
  np.testing.assert_array_equal(kept, np.arange(S) >= S - 2)
  np.testing.assert_array_equal(np.asarray(switch(values).plan.kept)[0, :, 0], np.arange(S) < 2)


@pytest.mark.parametrize('exploration', ['jitter', 'argmax', 'sample', 'dropout'])
def test_explorations_of_switch(exploration):
  """Logits (1, 0, 0, 0), p = e/(e + 3) = 0.475 of the first. By 1% of jitter it is always the best; a sample is each of
  the others with probability 0.175; dropout leaves 1/0.9, p = 0.503, or with probability 0.1 a tie, p = 1/4."""
  values = jnp.broadcast_to(jnp.float32([1., 0, 0, 0]), (1, 2048, E))
  config = papers.switch(exploration=exploration) | dict(place=dict(name='dropless'))
  built = functional.functionalize(lambda rngs: router.build(config, 'router', dim=E, num_experts=E, rngs=rngs))
  plan = jax.jit(functools.partial(built.apply, train=True))(dict(score=dict(kernel=jnp.eye(E))), {}, values,
                                                             RouterInputs(), key=KEY).plan
  second = float((plan.expert == 1).mean())
  assert second == pytest.approx(0.175 if exploration == 'sample' else 0, abs=0.04)  # standard error 0.008
  weight = np.asarray(plan.weight[0, :, 0])
  if exploration == 'dropout':
    np.testing.assert_allclose(np.unique(weight.round(3)), [0.25, 0.503])
    assert (weight < 0.3).mean() == pytest.approx(0.1, abs=0.03)
  if exploration in ('argmax', 'jitter'):
    assert (weight.std() > 1e-4) == (exploration == 'jitter')


def test_sampling_and_retrying_exclude_each_other():
  with pytest.raises(ValueError, match='Change one of them'):
    papers.switch(exploration='sample', overflow='retry')
