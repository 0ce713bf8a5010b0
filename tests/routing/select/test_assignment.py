"""Assigning tokens to experts: balance is counted; totals are compared with scipy's exact assignment, the auction with a
loop over its rounds, and SWIPE with a loop over tokens, all written from the descriptions of the published code.
"""
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.fastmoe_swipe import swipe
from moejax.routing.select import assignment
import routing_reference as reference

S, E, D = 24, 4, 8
seeds = st.integers(0, 2**20)
ALL = np.ones(S, bool)

auction = jax.jit(assignment.auction, static_argnums=(2, 3))


def scores(seed, bias=0.):
  """Independent scores, and a preference of all tokens for the same experts."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(S, E)) + bias * rng.normal(size=E)).astype(np.float32)


def eps(scores):
  return max((scores.max() - scores.min()) / 50, 1e-4)


def best_total(scores):
  """The largest total of an assignment with at most ceil(n/E) tokens per expert."""
  slots = np.repeat(scores.astype(np.float64), -(-len(scores) // scores.shape[1]), axis=1)
  return slots[linear_sum_assignment(slots, maximize=True)].sum()


def total(scores, expert):
  return scores[np.arange(len(scores)), expert].sum(dtype=np.float64)


def auction_by_rounds(scores, insist):
  """fairseq's auction, token by token: `insist` rounds in which experts keep what they hold."""
  share, step = len(scores) // scores.shape[1], eps(scores)
  price, holder = np.zeros(len(scores)), {}
  for turn in range(10_000):
    bids = [{} for _ in scores]
    for expert in range(scores.shape[1]):
      def worth(token):
        if holder.get(token) == expert:
          return scores.max() if turn <= insist else scores[token, expert]
        return scores[token, expert] - price[token]
      ranked = sorted(range(len(scores)), key=worth, reverse=True)
      for token in ranked[:share]:
        bids[token][expert] = worth(token) - worth(ranked[share]) + step
    for token, expert in holder.items():
      if 0 < turn < insist:
        bids[token][expert] = step
    holder = {token: max(offers, key=offers.get) for token, offers in enumerate(bids) if offers}
    if len(holder) == len(scores):
      return [holder[token] for token in range(len(scores))]
    price += [max(offers.values(), default=0.) for offers in bids]
  raise AssertionError('the auction does not end')


@given(seeds, st.sampled_from([0., 1., 10.]))
def test_every_expert_gets_the_same_number_of_tokens(seed, bias):
  expert = auction(scores(seed, bias), ALL)
  np.testing.assert_array_equal(np.bincount(expert, minlength=E), S // E)


@given(seeds, st.sampled_from([0., 1., 10.]))
def test_the_total_score_is_within_eps_a_token_of_the_best_assignment(seed, bias):
  values = scores(seed, bias)
  assert best_total(values) - S * eps(values) <= total(values, auction(values, ALL)) <= best_total(values) + 1e-4


@given(seeds, st.sampled_from([0., 1.]), st.sampled_from([0, 2, 100]))
def test_the_auction_is_fairseq_s_round_by_round(seed, bias, rounds):
  values = scores(seed, bias)
  np.testing.assert_array_equal(auction(values, ALL, rounds), auction_by_rounds(values, rounds))


@given(seeds, st.integers(0, 2**S - 1))
def test_padding_takes_no_part_and_no_expert_more_than_its_share_of_the_rest(seed, bits):
  valid = np.array([bits >> bit & 1 for bit in range(S)], bool)
  values = scores(seed, 1.)
  expert = np.asarray(auction(values, valid))
  np.testing.assert_array_equal(
      expert[valid], np.asarray(auction(np.where(valid[:, None], values, np.nan).astype(np.float32), valid))[valid])
  if valid.any():
    kept = values[valid]
    assert np.bincount(expert[valid], minlength=E).max() <= -(-len(kept) // E)
    # A few tokens that nobody prefers take part; where tokens are few they make the auction coarser.
    assert total(kept, expert[valid]) >= best_total(kept) - 2 * (len(kept) + E) * eps(kept)


@pytest.mark.parametrize('values', [
    np.zeros((S, E)), np.full((S, E), 1e6), np.full((S, E), np.nan), np.tile([[3., 0., 0., 0.]], (S, 1)),
    np.random.default_rng(0).integers(-1, 2, (S, E))], ids=['zero', 'large', 'nan', 'one expert', 'ties'])
@pytest.mark.parametrize('limits', [(100, 1000), (3, 1000), (100, 2)], ids=['', 'not insisting', 'cut off'])
def test_it_is_balanced_and_ends_for_any_scores_and_limits(values, limits):
  expert = np.asarray(auction(values.astype(np.float32), ALL, *limits))
  np.testing.assert_array_equal(np.bincount(expert, minlength=E), S // E)


def test_scores_that_are_not_finite_count_as_the_smallest_finite_one():
  values = scores(0)
  values[3, 1] = values.min()
  broken = values.copy()
  broken[3, 1] = np.nan
  np.testing.assert_array_equal(auction(values, ALL), auction(broken, ALL))


def test_an_offset_of_all_scores_changes_nothing():
  values = np.round(16 * scores(0)) / 16  # sums with 4096 are exact
  np.testing.assert_array_equal(auction(values, ALL), auction(values + 4096, ALL))


def swipe_by_tokens(expert, num_experts):
  """FastMoE's SWIPE: for every choice a queue per expert, then the free slots, lowest expert first."""
  tokens, choices = expert.shape
  slots = [-(-tokens * choices // num_experts)] * num_experts
  moved = expert.copy()
  for choice in range(choices):
    late = []
    for token in range(tokens):
      wanted = expert[token, choice]
      slots[wanted] -= 1
      if slots[wanted] < 0:
        slots[wanted] = 0
        late.append(token)
    for token in late:
      moved[token, choice] = next(e for e in range(num_experts) if slots[e])
      slots[moved[token, choice]] -= 1
  return moved


@given(st.lists(st.integers(0, E - 1), min_size=2 * S, max_size=2 * S))
def test_swipe_is_a_queue_at_every_expert_and_then_the_free_slots_in_order(claims):
  expert = np.array(claims, np.int32).reshape(S, 2)
  moved = np.asarray(jax.jit(swipe, static_argnums=2)(expert[None], ALL[None], E))[0]
  np.testing.assert_array_equal(moved, swipe_by_tokens(expert, E))
  np.testing.assert_array_equal(np.bincount(moved.ravel(), minlength=E), 2 * S // E)


def test_swipe_moves_nothing_where_choices_are_balanced_and_skips_padding():
  expert = np.array([[0], [1], [1], [0], [0]], np.int32)[None]
  valid = np.array([[True, True, True, True, False]])
  np.testing.assert_array_equal(swipe(expert, valid, 2)[valid], expert[valid])
  assert swipe(expert, np.ones_like(valid), 2)[0, :, 0].tolist() == [0, 1, 1, 0, 0]
  assert swipe(np.zeros_like(expert), valid, 2)[0, :4, 0].tolist() == [0, 0, 1, 1]


def route(fragment, x, train, num_experts=E):
  built = router.build(fragment, 'config.router', dim=x.shape[-1], num_experts=num_experts, rngs=nnx.Rngs(0))
  return built, reference.run(built, x, RouterInputs(), key=jax.random.key(0), train=train)


def test_centroids_start_orthogonal_and_of_length_a_tenth():
  kernel = route(papers.base(), jnp.zeros((1, S, D)), train=False)[0].score.kernel[...]
  np.testing.assert_allclose(kernel.T @ kernel, 0.01 * np.eye(E), atol=1e-8)  # one float32 rounding of 0.01


def test_base_is_balanced_in_training_greedy_without_limit_at_evaluation_and_weighed_by_the_sigmoid():
  x = jax.random.normal(jax.random.key(1), (2, S, D)) + 5.
  built, trained = route(papers.base(), x, train=True)
  _, evaluated = route(papers.base(), x, train=False)
  affinity = np.asarray(x @ built.score.kernel[...])
  np.testing.assert_array_equal(trained.plan.shares().sum(1), S // E)
  np.testing.assert_array_equal(evaluated.plan.expert[..., 0], affinity.argmax(-1))
  assert evaluated.plan.shares().sum(1).max() > S // E
  for plan in (trained.plan, evaluated.plan):
    chosen = np.take_along_axis(affinity, np.asarray(plan.expert), axis=-1)
    np.testing.assert_allclose(plan.weight, 1 / (1 + np.exp(-chosen)), rtol=1e-5)
  assert (built.leak(True), built.leak(False)) == ('future', 'causal')


def test_centroids_learn_through_the_weight_of_their_own_tokens_alone():
  """With a = sigmoid(x.w_e): d sum(a) / dw_e is the sum of a (1-a) x over the tokens of e."""
  x = jax.random.normal(jax.random.key(1), (1, S, D))
  built, out = route(papers.base(), x, train=True)
  graph, state = nnx.split(built)
  gradient = jax.grad(lambda state: nnx.merge(graph, state)(x, RouterInputs(), train=True).plan.weight.sum())(state)
  expert, alpha = (np.asarray(array)[0, :, 0] for array in (out.plan.expert, out.plan.weight))
  expected = [(alpha * (1 - alpha) * (expert == e)) @ np.asarray(x[0]) for e in range(E)]
  np.testing.assert_allclose(gradient['score']['kernel'][...].T, expected, rtol=1e-4, atol=1e-5)


def test_swipe_weighs_by_a_softmax_over_the_experts_that_a_token_ends_at():
  x = jax.random.normal(jax.random.key(1), (1, S, D)) + 1.
  built, out = route(papers.fastmoe_swipe(), x, train=True)
  logits = np.asarray(x @ built.score.kernel[...] + built.score.bias[...])
  chosen = np.exp(np.take_along_axis(logits, np.asarray(out.plan.expert), axis=-1))
  np.testing.assert_allclose(out.plan.weight, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_a_token_cannot_choose_more_experts_than_there_are():
  with pytest.raises(ConfigError, match='config.router.select.k: a token cannot choose 5 of 4 experts'):
    route(papers.fastmoe_swipe(k=5), jnp.zeros((1, S, D)), train=False)


@pytest.mark.parametrize('name', ['base', 's_base', 'fastmoe_swipe', 'sparse_ot', 'sparse_ot_tokens',
                                  'capped_expert_choice', 'mtf_expert_choice', 'strictly_balanced'])
def test_a_group_of_padding_routes_nothing_and_stays_finite(name):
  built = router.build(papers.PAPERS[name].fragment(), 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, S, D))
  valid = jnp.zeros((2, S), bool).at[1].set(True)
  out = reference.run(built, x, RouterInputs(valid=valid), key=jax.random.key(0), train=True)
  assert (np.asarray(out.plan.shares())[0] == 0).all() and np.asarray(out.plan.shares())[1].any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
