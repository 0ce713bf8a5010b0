"""Further experts of a token, against the frequencies of their definition."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing import papers
from moejax.routing.stages import SELECTIONS, noiseless

E = 4
KEY = jax.random.key(0)


def selected(probs, number=4096, train=True, **config):
  """The choices of `number` equal tokens with these router probabilities."""
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (1, number, len(probs)))
  select = SELECTIONS.build(dict(name='thresholded_top_k', k=3) | config, 'config.select', num_experts=len(probs))
  return select(noiseless(logits), jnp.ones((1, number), bool), key=KEY, train=train)


# Renormalised over the three best, (5, 3, 1, 1)/10 is (5, 3, 1)/9.
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('threshold, second, third', [
    (0.2, 1, 5 / 9), ((0.5, 0.25), 2 / 3, 4 / 9), ((1., 1.), 1 / 3, 1 / 9)])
def test_each_rank_counts_as_often_as_its_threshold_says(threshold, second, third, train):
  plan = selected([.5, .3, .1, .1], threshold=threshold, train=train)
  np.testing.assert_array_equal(plan.expert[0, 0], [0, 1, 2])
  # 4,096 draws: standard error below 0.008.
  np.testing.assert_allclose(plan.kept[0].mean(0), [1, second, third], atol=0.035)


def test_fairseq_compares_probabilities_as_they_are():
  plan = selected([.5, .3, .1, .1], threshold=0.5, gate='probability')
  np.testing.assert_allclose(plan.kept[0].mean(0), [1, .6, .2], atol=0.035)  # min(1, 2 p)


# g2 = p2/(p1+p2); as they are, probabilities would keep .6, .6 and .4 of the second choices.
@pytest.mark.parametrize('probs, kept', [([.5, .3, .1, .1], 3 / 4), ([.4, .3, .2, .1], 6 / 7), ([.6, .2, .1, .1], 1 / 2)])
@pytest.mark.parametrize('train', [True, False])
def test_fairseq_compares_renormalised_gates_where_it_renormalises_before_dropping(probs, kept, train):
  select = papers.fairseq(second='random', renormalize='before')['select']
  plan = selected(probs, train=train, **select)
  np.testing.assert_allclose(plan.kept[0].mean(0), [1, kept], atol=0.035)  # standard error 0.008


def test_evaluation_draws_the_same_every_time_and_training_by_its_key():
  one, again = (selected([.5, .3, .1, .1], train=False).kept for _ in range(2))
  np.testing.assert_array_equal(one, again)
  with pytest.raises(ValueError, match='draws random numbers in training'):
    SELECTIONS.build(dict(name='thresholded_top_k', k=2), 'select', num_experts=E)(
        noiseless(jnp.zeros((1, 2, E))), jnp.ones((1, 2), bool), key=None, train=True)


@pytest.mark.parametrize('policy, kept', [('all', [1, 1, 1]), ('none', [1, 0, 0]), ('threshold', [1, 1, 0])])
def test_policies_without_chance(policy, kept):
  plan = selected([.5, .3, .1, .1], number=1, policy=policy, threshold=0.2)  # 3/9 > 0.2 > 1/9
  np.testing.assert_array_equal(plan.kept[0, 0], kept)


def test_a_threshold_of_zero_keeps_all():
  assert selected([.5, .3, .1, .1], threshold=0.).kept.all()


def test_thresholds_are_one_for_each_further_choice():
  with pytest.raises(ConfigError, match=r'config\.select\.threshold has 3 values for 2 choices after'):
    selected([.5, .3, .1, .1], threshold=(.1, .2, .3))
