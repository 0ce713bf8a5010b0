"""Selection against sorting in numpy, exact counts, and frequencies of samples."""
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing import router
from moejax.routing.inputs import RouterInputs
from moejax.routing.select import dense, expert_choice, top_k
from moejax.routing.stages import SELECTIONS, noiseless
import routing_reference as reference

G, S, E = 2, 7, 4
KEY = jax.random.key(0)
# Few distinct values, so that ties are common.
tied_scores = st.lists(st.integers(-2, 2), min_size=G * S * E, max_size=G * S * E).map(
    lambda values: np.asarray(values, np.float32).reshape(G, S, E))

top_k = jax.jit(top_k.top_k, static_argnums=1)
expert_choice = jax.jit(expert_choice.expert_choice, static_argnums=2)


def build(num_experts=E, **config):
  return SELECTIONS.build(config, 'config.select', num_experts=num_experts)


@given(tied_scores, st.integers(1, E))
def test_top_k_is_a_stable_sort_cut_off(scores, k):
  np.testing.assert_array_equal(top_k(scores, k), np.argsort(-scores, axis=-1, kind='stable')[..., :k])


def test_the_experts_of_a_token_whose_scores_are_not_numbers_exist():
  scores = jnp.array([[1., jnp.nan, 2., 0.], [jnp.nan] * E])
  assert ((0 <= top_k(scores, 2)) & (top_k(scores, 2) < E)).all()


@given(tied_scores, st.integers(1, S), st.integers(0, 2**14 - 1))
def test_every_expert_takes_exactly_its_capacity_of_the_tokens_that_want_it_most(scores, capacity, valid):
  probs = reference.softmax(scores).astype(np.float32)
  valid = np.array([valid >> bit & 1 for bit in range(G * S)], bool).reshape(G, S)
  token, filled = expert_choice(probs, valid, capacity)
  for g, e in np.ndindex(G, E):
    ranked = sorted(np.flatnonzero(valid[g]), key=lambda s: -probs[g, s, e])[:capacity]
    assert list(token[g, e][filled[g, e]]) == ranked


def test_padding_is_routed_nowhere():
  scores = noiseless(jax.random.normal(KEY, (1, 3, E)))
  valid = jnp.array([[True, False, True]])
  for config in (dict(name='top_k', k=2), dict(name='gshard_top_2'), dict(name='sample', k=1),
                 dict(name='expert_choice', capacity_factor=4.), dict(name='all')):
    plan = build(**config)(scores, valid, key=KEY, train=True)
    np.testing.assert_array_equal(plan.shares()[0, 1], np.zeros(E))
    assert (plan.shares()[0, 0] > 0).any()


def second_expert_share(probs, **config):
  """How often each expert is the second one of 4,096 equal tokens, and how often there is one at all."""
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs)), (1, 4096, len(probs)))
  select = build(len(probs), name='gshard_top_2', **config)
  plan = select(noiseless(logits), jnp.ones((1, 4096), bool), key=KEY, train=True)
  assert (plan.expert[..., 0] == np.argmax(probs)).all() and plan.kept[..., 0].all()
  second = np.bincount(np.asarray(plan.expert[0, :, 1]), minlength=len(probs)) / 4096
  return second, float(plan.kept[..., 1].mean())


# 4,096 draws: a frequency is within 0.04 (five standard errors at most) of its probability.
def test_the_second_expert_is_always_the_second_best_by_the_policy_all():
  second, routed = second_expert_share([.6, .3, .1], second='all')
  assert second.tolist() == [0, 1, 0] and routed == 1


def test_the_second_expert_is_drawn_from_the_softmax_without_the_first_by_the_policy_sampling():
  second, routed = second_expert_share([.6, .3, .1], second='sampling')
  np.testing.assert_allclose(second, [0, .75, .25], atol=0.04)
  assert routed == 1


@pytest.mark.parametrize('threshold, expected', [
    (0.5, 2 / 3),    # g2 = .3/.9 = 1/3; GShard keeps it with probability 2*g2
    (0.2, 1.),       # Mesh TensorFlow: 1/3 is above the threshold
    (1., 1 / 3),
])
def test_the_second_expert_comes_with_probability_g2_over_threshold_by_the_policy_random(threshold, expected):
  second, routed = second_expert_share([.6, .3, .1], second='random', threshold=threshold)
  assert second.tolist() == [0, 1, 0]
  assert routed == pytest.approx(expected, abs=0.04)


def test_the_second_expert_is_random_at_evaluation_only_if_configured_and_then_repeats():
  logits = jnp.broadcast_to(jnp.log(jnp.array([.8, .2])), (1, 512, 2))
  valid = jnp.ones((1, 512), bool)
  always, mesh_tensorflow = (
      build(2, name='gshard_top_2', second='random', eval_second=policy) for policy in ('all', 'random'))
  assert always(noiseless(logits), valid, key=None, train=False).kept.all()
  first, second = (mesh_tensorflow(noiseless(logits), valid, key=key, train=False).kept for key in (None, KEY))
  np.testing.assert_array_equal(first, second)
  assert 0.2 < float(first[..., 1].mean()) < 0.6  # 2*g2 = 0.4


def test_sampled_experts_follow_the_softmax_in_training_and_are_the_best_at_evaluation():
  probs = np.array([.5, .3, .2])
  scores = noiseless(jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (1, 4096, 3)))
  valid = jnp.ones((1, 4096), bool)
  select = build(3, name='sample', k=1)
  drawn = select(scores, valid, key=KEY, train=True).expert
  np.testing.assert_allclose(np.bincount(np.asarray(drawn).ravel(), minlength=3) / 4096, probs, atol=0.04)
  assert (select(scores, valid, key=None, train=False).expert == 0).all()


def test_randomness_needs_a_key_in_training():
  scores, valid = noiseless(jnp.zeros((1, 2, 3))), jnp.ones((1, 2), bool)
  for config in (dict(name='sample', k=1), dict(name='gshard_top_2', second='random'),
                 dict(name='gshard_top_2', second='sampling')):
    with pytest.raises(ValueError, match='draws random numbers in training'):
      build(3, **config)(scores, valid, key=None, train=True)


def test_soft_dispatch_is_a_distribution_over_valid_tokens():
  logits = 3 * jax.random.normal(KEY, (2, 5, 2, 3))
  valid = jnp.array([[True, True, False, True, False], [False] * 5])
  dispatch = dense.soft_dispatch(logits, valid)
  expected = reference.softmax(np.asarray(logits[0, [0, 1, 3]]), axis=0)
  # One rounding of each of a few float32 operations.
  np.testing.assert_allclose(dispatch[0, [0, 1, 3]], expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(dispatch[0, [2, 4]], 0)
  np.testing.assert_array_equal(dispatch[1], 0)


@pytest.mark.parametrize('config, num_experts', [
    (dict(name='top_k', k=5), 4), (dict(name='gshard_top_2'), 1), (dict(name='sample', k=3), 2)])
def test_a_token_cannot_choose_more_experts_than_there_are(config, num_experts):
  with pytest.raises(ConfigError, match=rf'config\.select: a token cannot choose \d of {num_experts} experts'):
    build(num_experts, **config)


def test_expert_choice_that_takes_no_token_says_so():
  select = build(4, name='expert_choice', capacity_factor=0.5, convention='lingvo')
  with pytest.raises(ValueError, match=r'^\.capacity_factor = 0\.5 drops every token'):
    select(noiseless(jnp.zeros((1, 4, 4))), jnp.ones((1, 4), bool), key=None, train=False)


def test_expert_choice_takes_every_token_once_where_there_is_one_expert():
  plan = build(1, name='expert_choice', capacity_factor=2.)(
      noiseless(jnp.zeros((1, 5, 1))), jnp.ones((1, 5), bool), key=None, train=False)
  np.testing.assert_array_equal(plan.shares(), np.ones((1, 5, 1)))


@given(st.lists(st.integers(-2, 2), min_size=5 * 8, max_size=5 * 8), st.integers(1, 4),
       st.sampled_from(['max', 'top_2_sum']))
def test_a_token_takes_its_experts_from_its_best_groups(values, kept, group_score):
  """8 experts in 4 groups, against sorting groups and then experts in numpy; 2 experts per token."""
  scores = np.asarray(values, np.float32).reshape(1, 5, 8)
  select = build(8, name='group_limited', k=2, groups=4, groups_per_token=kept, group_score=group_score)
  plan = select(noiseless(scores), jnp.ones((1, 5), bool), key=None, train=False)
  for token, chosen in enumerate(plan.expert[0].tolist()):
    groups = scores[0, token].reshape(4, 2)
    of_group = groups.max(1) if group_score == 'max' else groups.sum(1)
    best = np.argsort(-of_group, kind='stable')[:kept]
    assert len({expert // 2 for expert in chosen}) <= kept
    ranked = sorted((e for e in range(8) if e // 2 in best), key=lambda e: (-scores[0, token, e], e))
    assert chosen == ranked[:2]


def test_with_all_groups_a_limit_changes_nothing():
  scores, valid = noiseless(jax.random.normal(KEY, (2, 7, 8))), jnp.ones((2, 7), bool)
  plans = [build(8, **config)(scores, valid, key=None, train=False).expert for config in (
      dict(name='top_k', k=3), dict(name='group_limited', k=3, groups=4, groups_per_token=4))]
  np.testing.assert_array_equal(*plans)


@pytest.mark.parametrize('config, message', [
    (dict(k=2, groups=3, groups_per_token=1), 'config.select.groups must be .* that divides num_experts, not 3'),
    (dict(k=3, groups=4, groups_per_token=1), 'groups_per_token must be between 2 .* and 4'),
    (dict(k=2, groups=4, groups_per_token=5), 'groups_per_token must be between 1 .* and 4'),
    (dict(k=2, groups=8, groups_per_token=2, group_score='top_2_sum'), 'needs groups of at least two experts'),
])
def test_groups_that_cannot_be_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    build(8, name='group_limited', **config)


def gates_of(weighting, values):
  return 1 / (1 + np.exp(-values)) if weighting == 'sigmoid' else reference.softmax(values)


def limited_by_gates(gates, groups, kept, k):
  """DeepSeek-V3's choice for one token: groups by the sum of their two largest gates, then experts by their gates."""
  by_group = gates.reshape(groups, -1)
  best = np.argsort(-np.sort(by_group, axis=-1)[:, -2:].sum(-1), kind='stable')[:kept]
  allowed = np.isin(np.arange(gates.size) // by_group.shape[1], best)
  return np.argsort(-np.where(allowed, gates, -1), kind='stable')[:k]


@pytest.mark.parametrize('weighting', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('balance', [{}, dict(bias=dict(rate=1e-3))])
def test_groups_are_ranked_by_sums_of_gates_not_of_logits(weighting, balance):
  """Sigmoids as DeepSeek-V3, softmax as Megatron-LM; a bias that is zero changes nothing."""
  values = 2 * np.random.default_rng(0).normal(size=(1, 50, 16)).astype(np.float32)
  # Logits say the first group (8 - 4 > 1 + 1), sigmoids the second (1.018 < 1.462).
  values[0, 0] = [8, -4, -9, -9, 1, 1, -9, -9] + [-9] * 8
  config = dict(score=dict(name='linear'), weigh=dict(name=weighting), balance=balance,
                select=dict(name='group_limited', k=3, groups=4, groups_per_token=1, group_score='top_2_sum'))
  built = router.build(config, 'router', dim=16, num_experts=16, rngs=nnx.Rngs(0))
  built.score.kernel[...] = jnp.eye(16)
  expert = reference.run(built, jnp.asarray(values), RouterInputs()).plan.expert[0]
  gates = gates_of(weighting, values[0].astype(np.float64))
  np.testing.assert_array_equal(expert, [limited_by_gates(token, 4, 1, 3) for token in gates])
  if weighting == 'sigmoid':
    np.testing.assert_array_equal(expert[0], [4, 5, 6])
  by_logits = np.array([limited_by_gates(token, 4, 1, 3) for token in values[0].astype(np.float64) + 100])
  assert (by_logits != np.asarray(expert)).any()
