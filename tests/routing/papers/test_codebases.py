"""Routing of DeepSpeed, FastMoE, GLaM and WideNet: against loops over tokens, numbers by hand, frequencies."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers.fastmoe import near_first
from moejax.routing.place import conventions
import routing_reference as reference

KEY = jax.random.key(0)


@functools.cache
def logits(seed, groups=2, tokens=12, experts=4):
  return 1.5 * np.random.default_rng(seed).normal(size=(groups, tokens, experts)).astype(np.float32)


def route(config, values, train=True, key=KEY):
  """Routes tokens whose features are their logits: kernels are the identity, biases 0."""
  experts = values.shape[-1]
  built = functional.functionalize(
      lambda rngs: router.build(config, 'router', dim=experts, num_experts=experts, rngs=rngs))
  params = {path: jnp.eye(experts) if leaf.ndim == 2 else jnp.zeros(leaf.shape)
            for path, leaf in functional.flatten(built.shapes()[0]).items()}
  return jax.jit(functools.partial(built.apply, train=train))(
      functional.unflatten(params), {}, jnp.asarray(values), RouterInputs(), key=key)


def both_seconds(config):
  """`config` with both experts always taken, which makes it deterministic."""
  return config | dict(select=dict(name='gshard_top_2', second='all'), score=config['score'] | dict(logit_jitter=0.))


def top_2_weights(values, capacity, queue_of):
  """[S,E] of one group: the two best, softmax over them, in buffers filled one by one."""
  probs = reference.softmax(values)
  expert = np.argsort(-probs, axis=-1, kind='stable')[:, :2]
  gate = np.take_along_axis(probs, expert, axis=-1)
  gate /= gate.sum(-1, keepdims=True)
  queue = queue_of(len(values), 2)
  kept = reference.fill_buffers(expert, np.ones(expert.shape, bool), values.shape[-1], capacity, queue)
  weights = np.zeros(values.shape)
  for token, choice in kept:
    weights[token, expert[token, choice]] = gate[token, choice]
  return weights


def dense(output):
  return np.asarray(output.plan.to_dense().weight)


# GLaM: int(12*0.8/4) = 2 slots, up to 4.
def test_glam_keeps_the_choices_of_a_queue_and_renormalises_before():
  out = route(papers.glam(capacity_factor=0.8), logits(0))
  expected = [top_2_weights(group, 4, reference.choice_major) for group in logits(0)]
  np.testing.assert_allclose(dense(out), expected, atol=1e-6)
  assert out.metrics['dropped'] > 0.05
  # Tokens that kept both experts have weights that sum to 1.
  both = (dense(out) > 0).sum(-1) == 2
  np.testing.assert_allclose(dense(out).sum(-1)[both], 1, rtol=1e-6)


# FastMoE on one worker: floor(ceil(0.7*12)*2/4) = 4 slots in the order of tokens, where 0.7*12*2/4 = 4.2. dc: of one of 4
# workers with 12/4 tokens each ceil(0.7*3) = 3; by the group of all of them ceil(0.35*12*2/4) = 3.
@pytest.mark.parametrize('gate, capacity', [('naive', 12), ('gshard', 4), ('dc', 3)])
def test_the_gates_of_fastmoe_equal_a_loop_over_tokens(gate, capacity):
  config = papers.fastmoe(gate=gate, capacity=(0.7, 0.7), experts_per_worker=1)
  out = route(both_seconds(config), logits(1))
  expected = [top_2_weights(group, capacity, reference.token_major) for group in logits(1)]
  np.testing.assert_allclose(dense(out), expected, atol=1e-6)
  if gate != 'naive':
    probs, best = reference.softmax(logits(1)).reshape(-1, 4), logits(1).argmax(-1).reshape(-1)
    share = np.bincount(best, minlength=4) / best.size
    assert float(out.metrics['fastmoe_loss']) == pytest.approx(4 * share @ probs.mean(0), rel=1e-5)


def test_fastmoe_sends_everything_to_the_first_expert_with_gate_zero():
  np.testing.assert_array_equal(dense(route(papers.fastmoe(gate='zero'), logits(1))), np.eye(4)[np.zeros((2, 12), int)])


def test_fastmoe_s_switch_loss_counts_surviving_tokens():
  """Probabilities (3/4, 1/4) twice and (1/4, 3/4), ceil(0.6*3/2) = 1 slot: the second token is dropped. Of the two that
  are left F = (1/2, 1/2), and P = (7/4, 5/4)/2 although the dropped token is in the sums: 2*(7/16 + 5/16) = 3/2. With
  all three: F = (2/3, 1/3), P = (7/4, 5/4)/3: 2*(14/36 + 5/36) = 19/18."""
  config = papers.fastmoe(gate='switch', capacity=(0.6, 0.6), balance=1.)
  values = np.log(np.float32([[[3, 1], [3, 1], [1, 3]]]))
  out = route(config | dict(score=config['score'] | dict(logit_jitter=0.)), values)
  np.testing.assert_allclose(dense(out)[0], [[.75, 0], [0, 0], [0, .75]], atol=1e-6)
  assert float(out.losses['fastmoe']) == pytest.approx(1.5)
  everything = config | dict(place=dict(name='dropless'), score=config['score'] | dict(logit_jitter=0.))
  assert float(route(everything, values).losses['fastmoe']) == pytest.approx(19 / 18)


def test_the_switch_gate_of_fastmoe_moves_logits_by_a_tenth_at_most_and_evaluation_by_nothing():
  config = papers.fastmoe(gate='switch') | dict(place=dict(name='dropless'))
  # Logits that differ by 0.1: the difference of two draws of U(-0.1, 0.1) is below -0.1 with probability 1/8.
  values = np.broadcast_to(np.float32([0.1, 0.]), (1, 4096, 2))
  load = route(config, values).metrics['load']
  assert float(load[1]) == pytest.approx(1 / 8, abs=0.02)  # 4,096 draws: standard error 0.005
  assert float(route(config, values + np.float32([0.11, 0])).metrics['load'][1]) == 0
  assert float(route(config, values, train=False).metrics['load'][1]) == 0


def near_first_by_token(values, local, allowed):
  """FasterMoE's example policy for one group, token by token: [S,2]."""
  ranked = np.argsort(-values, axis=-1, kind='stable')
  away = [token for token in range(len(values)) if not local[ranked[token, 0]]]
  if len(away) < allowed:
    return ranked[:, :2]
  travels = sorted(away, key=lambda token: -values[token].max())[:allowed]
  chosen = []
  for token in range(len(values)):
    first, second = [expert for expert in ranked[token] if local[expert]][:2]
    chosen.append((first, ranked[token, 0] if token in travels else second))
  return np.array(chosen)


@pytest.mark.parametrize('outgoing', [0.14, 0.5, 0.9])
def test_faster_sends_few_tokens_to_other_nodes(outgoing):
  """8 experts on 2 nodes; the first of two groups is on the first node."""
  values = logits(2, experts=8)
  config = papers.fastmoe(gate='faster', nodes=2)
  out = route(config | dict(select=config['select'] | dict(outgoing=outgoing)), values)
  local = [np.arange(8) // 4 == node for node in (0, 1)]
  expected = np.array([near_first_by_token(values[g], local[g], int(12 * outgoing)) for g in (0, 1)])
  np.testing.assert_array_equal(out.plan.expert, expected)
  for g in (0, 1):
    wish, travel = ((~local[g][experts]).sum() for experts in (values[g].argmax(-1), expected[g]))
    assert travel == int(12 * outgoing) or wish < int(12 * outgoing)
  # Weights: softmax over the two; the loss counts first choices wherever they were sent.
  chosen = np.take_along_axis(values, expected, axis=-1)
  np.testing.assert_allclose(out.plan.weight, reference.softmax(chosen), atol=1e-6)
  share = np.bincount(values.argmax(-1).reshape(-1), minlength=8) / 24
  loss = 8 * share @ reference.softmax(values).mean((0, 1))
  assert float(out.metrics['fastmoe_loss']) == pytest.approx(loss, rel=1e-5)


def test_padding_does_not_travel():
  # All prefer expert 2, which is on the other node.
  values = jnp.zeros((1, 4, 4)).at[..., 2].set(jnp.float32([3, 2, 1, 4]))
  local = jnp.asarray([[True, True, False, False]])
  valid = jnp.asarray([[True, True, True, False]])
  expert = near_first(values, local, valid, allowed=1)
  np.testing.assert_array_equal(expert[0], [[0, 2], [0, 1], [0, 1], [0, 1]])


def test_a_node_with_one_expert_leaves_no_two_choices():
  with pytest.raises(ConfigError, match=r'router\.select requires k = 2 and at least two experts on each node'):
    route(papers.fastmoe(gate='faster', nodes=2), logits(0, experts=2))


# DeepSpeed.


def test_deepspeed_keeps_every_token_equally_often():
  """24 tokens that all want one of 4 experts, ceil(24/4) = 6 slots: each stays in a quarter of the draws."""
  values = np.broadcast_to(np.float32([2., 0, 0, 0]), (400, 24, 4))
  kept = np.asarray(route(papers.deepspeed(), values).plan.kept)[..., 0]
  assert (kept.sum(-1) == 6).all()
  # Chi-squared with 23 degrees of freedom: above 49.7 once in a thousand.
  counts, expected = kept.sum(0), 400 / 4
  assert (np.square(counts - expected) / (expected * 3 / 4)).sum() < 49.7
  # Where there are slots for all, all stay.
  assert np.asarray(route(papers.deepspeed(), np.eye(4, dtype=np.float32)[None].repeat(3, 1)).plan.kept).all()


def test_deepspeed_without_random_token_selection_keeps_the_first():
  values = np.broadcast_to(np.float32([2., 0, 0, 0]), (1, 24, 4))
  kept = np.asarray(route(papers.deepspeed(random_token_selection=False), values).plan.kept)[0, :, 0]
  np.testing.assert_array_equal(kept, np.arange(24) < 6)


def test_rsample_draws_the_expert_from_the_softmax_and_weighs_by_the_probability_without_noise():
  values = np.broadcast_to(np.log(np.float32([6, 3, 1])), (1, 4096, 3))
  config = papers.deepspeed(noise='rsample', random_token_selection=False) | dict(place=dict(name='dropless'))
  plan = route(config, values).plan
  expert = np.asarray(plan.expert[0, :, 0])
  np.testing.assert_allclose(np.bincount(expert) / 4096, [.6, .3, .1], atol=0.03)  # standard error below 0.008
  np.testing.assert_allclose(plan.weight[0, :, 0], np.array([.6, .3, .1])[expert], rtol=1e-5)
  assert (np.asarray(route(config, values, train=False).plan.expert) == 0).all()


def test_deepspeed_gives_the_survivor_of_two_all_the_weight():
  out = route(papers.deepspeed(k=2, capacity_factor=0.5, min_capacity=0), logits(3))
  number = (dense(out) > 0).sum(-1)
  assert (number == 1).any()
  np.testing.assert_allclose(dense(out).sum(-1)[number > 0], 1, rtol=1e-6)


def test_deepspeed_draws_the_second_expert_at_evaluation_too():
  """From the softmax without the first: of (6, 3, 1)/10 expert 1 in 3/4 of the draws."""
  values = np.broadcast_to(np.log(np.float32([6, 3, 1])), (1, 4096, 3))
  config = papers.deepspeed(k=2) | dict(place=dict(name='dropless'))
  for train in (True, False):
    expert = np.asarray(route(config, values, train=train).plan.expert[0])
    assert (expert[:, 0] == 0).all()
    np.testing.assert_allclose(np.bincount(expert[:, 1]) / 4096, [0, 3 / 4, 1 / 4], atol=0.03)  # standard error 0.007


def topkgating(values, k, capacity):
  """DeepSpeed's `topkgating` since its commit 853c938, column by column: among all tokens, with 0 for those that did
  not choose the expert, the `capacity` of the largest softmax probability. [S,E] weights of what was chosen."""
  probs = reference.softmax(values)
  chosen = probs >= np.sort(probs, axis=-1)[:, -k:-k + 1 or None]
  kept = np.zeros(chosen.shape, bool)
  for expert in range(probs.shape[1]):
    kept[np.argsort(-np.where(chosen, probs, 0)[:, expert], kind='stable')[:capacity], expert] = True
  weights = np.where(chosen & kept, probs, 0)
  return weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float32).eps)


@pytest.mark.parametrize('k', [3, 4])
@pytest.mark.parametrize('shift', [-3., 0., 3.])  # whatever the signs of the logits
def test_deepspeed_keeps_the_most_probable_of_more_than_two_choices(k, shift):
  """ceil(12/6 * 0.5*k) slots."""
  values = logits(5, experts=6) + np.float32(shift) + logits(6)[..., :1]
  out = route(papers.deepspeed(k=k, capacity_factor=0.5, min_capacity=0), values)
  expected = [topkgating(group, k, int(np.ceil(k))) for group in values]
  np.testing.assert_allclose(dense(out), expected, atol=1e-6)
  assert out.metrics['dropped'] > 0.1


# WideNet.


def test_widenet_as_released_has_a_slot_less_and_fills_token_by_token():
  """12 tokens, 4 experts: int(12*0.7*2//4) - 1 = 3 slots; probabilities over all experts, not renormalised."""
  config = papers.widenet(capacity_factor=0.7, released=True)
  out = route(config, logits(4), train=False)
  for group, weights in zip(logits(4), dense(out)):
    probs = reference.softmax(group)
    expert = np.argsort(-probs, axis=-1, kind='stable')[:, :2]
    kept = reference.fill_buffers(expert, np.ones(expert.shape, bool), 4, 3, reference.token_major(12, 2))
    expected = np.zeros(group.shape)
    for token, choice in kept:
      expected[token, expert[token, choice]] = probs[token, expert[token, choice]]
    np.testing.assert_allclose(weights, expected, atol=1e-6)
  assert conventions.capacity(12, 4, 2, 0.7) == 5  # the paper's ceil(12*0.7*2/4) with all of them
