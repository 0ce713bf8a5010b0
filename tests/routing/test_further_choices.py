"""Further experts of a token: how often they count, where a token goes when its expert is full, what learns from it.

Against frequencies, queues filled one by one in numpy, and the gradient of the definition."""
import functools

from hypothesis import given
from hypothesis import strategies as st
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.place import retry
from moejax.routing.stages import SELECTIONS, noiseless
import routing_reference as reference

G, S, E = 2, 8, 4
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


def test_with_policy_none_a_token_has_one_expert_with_its_share_of_two():
  """lucidrains/mixture-of-experts renormalises before the policy: (.5, .3) gives the first 5/8."""
  built = functional.functionalize(lambda rngs: router.build(
      papers.lucidrains(policy='none', z=0., capacity_factor=4.), 'router', dim=4, num_experts=4, rngs=rngs))
  out = built.apply(dict(score=dict(kernel=jnp.eye(4))), {}, jnp.log(jnp.float32([[[.5, .3, .1, .1]]])), RouterInputs(),
                    key=KEY, train=True)
  np.testing.assert_allclose(out.plan.to_dense().weight[0, 0], [5 / 8, 0, 0, 0], rtol=1e-6)


def test_thresholds_are_one_for_each_further_choice():
  with pytest.raises(ConfigError, match=r'config\.select\.threshold has 3 values for 2 choices after'):
    selected([.5, .3, .1, .1], threshold=(.1, .2, .3))


# First choices that have a slot, in the balance loss of st-moe-pytorch. 2 experts; probabilities 3/4 and 1/4.
#   6 tokens that want expert 0, int(6*1.25/2) = 3 slots, at least 4: F = (4/6, 0), P = (3/4, 1/4): 2*4/6*3/4 = 1.
#   6 of 8, 2 want expert 1, int(8*1.25/2) = 5 slots: F = (5/8, 2/8), P = (5/8, 3/8): 2*(25+6)/64 = 31/32.
#   2 of 4: 4 slots, for everyone: 2*(1/2*1/2 + 1/2*1/2) = 1.
#   All first choices: 2*3/4, 2*(3/4*5/8 + 1/4*3/8) and 1.
@pytest.mark.parametrize('straight_through', [False, True])
@pytest.mark.parametrize('want_0, want_1, kept, everyone', [(6, 0, 1, 3 / 2), (6, 2, 31 / 32, 9 / 8), (2, 2, 1, 1)])
def test_the_balance_loss_of_st_moe_pytorch_counts_first_choices_that_have_a_slot(
    want_0, want_1, kept, everyone, straight_through):
  values = jnp.log(jnp.float32([[[3, 1]] * want_0 + [[1, 3]] * want_1]))

  def loss(**config):
    fragment = papers.lucidrains(straight_through=straight_through, z=0., **config)
    built = router.build(fragment, 'router', dim=2, num_experts=2, rngs=nnx.Rngs(0))
    built.score.kernel[...] = jnp.eye(2)
    output = reference.run(built, values, RouterInputs(), key=KEY, train=True)
    return sum(output.losses.values()) / 0.01

  assert float(loss()) == pytest.approx(kept, rel=1e-5)
  assert float(loss(balance_counts='all')) == pytest.approx(everyone, rel=1e-5)


# Retries.


def retried(expert, routed, capacity):
  """{(token, choice)}: round by round, tokens in order, whoever has no slot asks the next expert."""
  filled, kept, waiting = [0] * E, set(), [token for token in range(S) if routed[token]]
  for choice in range(expert.shape[-1]):
    left = []
    for token in waiting:
      name = expert[token, choice]
      if filled[name] < capacity:
        kept.add((token, choice))
        filled[name] += 1
      else:
        left.append(token)
    waiting = left
  return kept


slots_with_retries = jax.jit(retry.slots_with_retries, static_argnums=(2, 3))


@given(st.integers(0, 2**31), st.sampled_from([1, 3]), st.sampled_from([0.7, 1.]))
def test_retries_equal_a_loop_over_rounds_and_tokens(seed, capacity, share):
  numbers = np.random.default_rng(seed)
  expert = np.argsort(numbers.random((G, S, E)) * [1, 2, 3, 4])[..., :3].astype(np.int32)  # the first ones are popular
  routed = numbers.random((G, S)) < share
  kept, slot = (np.asarray(a) for a in slots_with_retries(expert, routed, E, capacity))
  for g in range(G):
    assert set(zip(*np.nonzero(kept[g]))) == retried(expert[g], routed[g], capacity)
    taken = [(expert[g, s, k], slot[g, s, k]) for s, k in zip(*np.nonzero(kept[g]))]
    assert len(set(taken)) == len(taken) and all(0 <= place < capacity for _, place in taken)


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


# Straight-through dispatch.


def test_straight_through_gives_dispatch_the_gradient_of_the_weights():
  """y = sum_e w_e f_e(d_e x) with d_e = 1 + w_e - stop_gradient(w_e): the same value as without, and a gradient that
  the definition, written for every token and expert without buffers, has too."""
  dim, hidden = 6, 10
  x = jax.random.normal(KEY, (2, 4, dim))

  def layer(straight_through):
    config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=hidden, activation='gelu'),
                  router=papers.lucidrains(policy='all', capacity_factor=16., z=0., straight_through=straight_through),
                  dispatch=dict(name='einsum'), group='sequence')
    return functional.functionalize(lambda rngs: call(MoE, config, 'moe', dim=dim, dtype=jnp.float32, rngs=rngs), MoE.mix)

  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: draw.normal(0, 0.5, leaf.shape).astype(np.float32), layer(True).shapes()[0])

  def definition(params, straight_through):
    probs = jax.nn.softmax(jnp.einsum('gsd,de->gse', x, params['router']['score']['kernel']), axis=-1)
    best = probs >= jnp.sort(probs, axis=-1)[..., -2:-1]
    w = jnp.where(best, probs, 0) / jnp.where(best, probs, 0).sum(-1, keepdims=True)
    d = 1 + (w - jax.lax.stop_gradient(w)) * straight_through
    inputs = d[..., None] * x[:, :, None]
    out = jnp.einsum('gsef,efd->gsed', jax.nn.gelu(jnp.einsum('gsed,edf->gsef', inputs, params['experts']['wi'])),
                     params['experts']['wo'])
    return jnp.einsum('gse,gsed->gsd', w, out)

  def slope(apply):
    return jax.jit(jax.value_and_grad(lambda params: jnp.sin(apply(params)).sum()))(params)

  gradients = []
  for straight_through in (True, False):
    model = layer(straight_through)
    value, gradient = slope(lambda params: model.apply(params, {}, x, key=KEY, train=True)[0])
    expected_value, expected = slope(lambda params: definition(params, straight_through))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    gradients.append(gradient['router']['score']['kernel'])
  assert abs(gradients[0] - gradients[1]).max() > 0.1


def test_places_that_know_positions_alone_refuse_priorities():
  config = papers.switch(overflow='retry')
  with pytest.raises(ConfigError, match=r'router\.place: this placement assigns slots by position and choice'):
    router.build(config | dict(place=config['place'] | dict(priority='batch')), 'router', dim=E, num_experts=E,
                 rngs=nnx.Rngs(0))
