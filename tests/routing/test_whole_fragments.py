"""Whole fragments in training, with the numbers that they have by default, against float64 loops over groups and tokens.

Tests of stages prove the stages; these prove that a fragment is made of the right ones, with its own noise, capacity,
priority and coefficients. Draws are replaced by known numbers, which the loops use as well.
"""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from moejax import functional
from moejax.routing import papers, router
from moejax.routing.features import RouterInputs
import routing_reference as reference
from routing_reference import softmax

G, S, D = 2, 101, 8  # a prime number of tokens, so that codebases' roundings of capacities differ
VALID = np.ones((G, S), bool)
VALID[0, 100:] = VALID[1, 84:] = False
X = np.random.default_rng(0).normal(size=(G, S, D)).astype(np.float32)
X[..., -1] = 3  # what all tokens share makes some experts popular, so that capacities count
TASKS = np.arange(S) % 3 + np.zeros((G, 1), int)
IMAGES = np.arange(S) < 60
X[:, ~IMAGES, -2] = 5  # and text likes few
SHARED = np.random.default_rng(2).normal(size=(G, S, 5)).astype(np.float32)


def uniform(shape):
  return np.random.default_rng([1, *shape]).random(shape).astype(np.float32)


def normal(shape):
  return np.random.default_rng([2, *shape]).normal(size=shape).astype(np.float32)


def gumbel(shape):
  return np.random.default_rng([3, *shape]).gumbel(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def known_draws(monkeypatch):
  def draw_uniform(key, shape=(), dtype=jnp.float32, minval=0., maxval=1.):
    return minval + (maxval - minval) * jnp.asarray(uniform(shape), dtype)
  monkeypatch.setattr(jax.random, 'uniform', draw_uniform)
  monkeypatch.setattr(jax.random, 'normal', lambda key, shape=(), dtype=jnp.float32: jnp.asarray(normal(shape), dtype))
  monkeypatch.setattr(jax.random, 'gumbel', lambda key, shape=(), dtype=jnp.float32: jnp.asarray(gumbel(shape), dtype))


def route(fragment, num_experts):
  """(output of a training step, its parameters in float64 by name)."""
  built = functional.functionalize(
      lambda rngs: router.build(fragment, 'router', dim=D, num_experts=num_experts, rngs=rngs))
  draw, (shapes, state) = np.random.default_rng(4), built.shapes()
  params = {path: (draw.normal(0, 0.5, leaf.shape) if leaf.ndim else np.array(2.5)).astype(np.float32)
            for path, leaf in functional.flatten(shapes).items()}
  state = {path: draw.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in functional.flatten(state).items()}
  inputs = RouterInputs(valid=jnp.asarray(VALID), tasks=jnp.asarray(TASKS), shared=jnp.asarray(SHARED),
                        modalities=jnp.broadcast_to(jnp.where(IMAGES, 0, 1), (G, S)))
  output = jax.jit(functools.partial(built.apply, train=True))(
      functional.unflatten(params), functional.unflatten(state), jnp.asarray(X), inputs, key=jax.random.key(0))
  return output, {path.rpartition('/')[2]: np.float64(value) for path, value in {**params, **state}.items()}


# What several papers say, for one group.


def best(logits, k):
  return np.argsort(-logits, axis=-1, kind='stable')[:, :k]


def at(values, expert):
  return np.take_along_axis(values, expert, axis=-1)


def shares(gates):
  return gates / gates.sum(-1, keepdims=True)


def dense(expert, gates, kept, num_experts):
  """[S,E] of [S,K]."""
  weights = np.zeros((len(expert), num_experts))
  for s, k in zip(*np.nonzero(kept)):
    weights[s, expert[s, k]] += gates[s, k]
  return weights


def queued(expert, routed, num_experts, slots, queue):
  """[S,K] which choices have a slot; `queue`: all (token, choice), who goes first first."""
  kept = np.zeros(expert.shape, bool)
  for entry in reference.fill_buffers(expert, routed, num_experts, slots, queue):
    kept[entry] = True
  return kept


def by_position(expert):
  return reference.choice_major(*expert.shape)


def variation(amounts):
  return amounts.var() / amounts.mean()**2


def balance(probs, expert, valid):
  """E sum_e F_e P_e, F_e the share of the choices `expert` [S,K]."""
  share = np.bincount(expert[valid].ravel(), minlength=probs.shape[1]) / expert[valid].size
  return probs.shape[1] * share @ probs[valid].mean(0)


def group_mean(of_group):
  return np.mean([of_group(g) for g in range(G)])


def top_2_placed(logits, second, slots, after, num_experts=4):
  """Weights of the two best: the second where `second` of its share [S] says so, gates renormalised before what has no
  slot is dropped, or after."""
  weights = []
  for g in range(G):
    gates = softmax(logits[g])
    expert = best(logits[g], 2)
    gate = shares(at(gates, expert))
    routed = VALID[g][:, None] & np.stack([np.ones(S, bool), second(gate[:, 1], at(gates, expert)[:, 1], g)], 1)
    kept = queued(expert, routed, num_experts, slots, by_position(expert))
    weights.append(dense(expert, gate, kept, num_experts))
  weights = np.array(weights)
  return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) if after else weights


def first_choices_loss(logits):
  return group_mean(lambda g: balance(softmax(logits[g]), best(logits[g], 1), VALID[g]))


def always(share, probability, g):
  return np.ones(S, bool)


def in_top_k(noisy, clean, std, k):
  """Probability of each to be among the k best if its own noise were drawn again: [..., N], by a loop."""
  prob = np.ones(clean.shape)
  for index in np.ndindex(clean.shape):
    others = np.sort(np.delete(noisy[index[:-1]], index[-1]))[::-1]
    if k <= len(others):
      prob[index] = norm.cdf((clean[index] - others[k - 1]) / std[index])
  return prob


# Papers: parameters -> (weights [G,S,E], losses with their coefficients).


def vmoe(p, k=2, slots=56, num_experts=4):  # ceil(101*2*1.05/4) = 54, up to 56
  clean = X @ p['kernel']
  noisy = clean + normal(clean.shape) / num_experts
  weights, load = [], []
  for g in range(G):
    gates, expert = softmax(noisy[g]), best(noisy[g], k)
    gate = at(gates, expert)
    kept = queued(expert, np.repeat(VALID[g][:, None], k, 1), num_experts, slots, reference.batch_prioritized(gate))
    weights.append(dense(expert, gate, kept, num_experts))
    load.append(norm.cdf((clean[g] - at(noisy[g], expert)[:, -1:]) * num_experts)[VALID[g]].sum(0))
  return np.array(weights), dict(
      importance=0.005 * group_mean(lambda g: variation(softmax(clean[g])[VALID[g]].sum(0))),
      load=0.005 * group_mean(lambda g: variation(load[g])))


def limoe(p):  # ceil(101*1.05/32) = 4
  weights, losses = vmoe(p, k=1, slots=4, num_experts=32)
  clean = X @ p['kernel']
  entropy = lambda probs: -(probs * np.log(probs)).sum(-1)
  image, text = ([softmax(clean[g])[VALID[g] & members] for g in range(G)] for members in (IMAGES, ~IMAGES))
  of_all = lambda members, experts: group_mean(lambda g: max(0, math.log(experts) - entropy(members[g].mean(0))))
  return weights, losses | dict(
      z=0.001 * np.mean(logsumexp(clean, axis=-1)[VALID]**2),
      local_entropy=0.04 * group_mean(lambda g: entropy(text[g]).mean()),
      global_entropy=0.04 * (of_all(image, 20) + of_all(text, 9)))


def gmoe(p):  # int(1.5*ceil(101/4)) = 39
  unit = lambda rows: rows / np.sqrt((rows**2).sum(-1, keepdims=True))
  clean = unit(X @ p['kernel'] + p['bias']) @ unit(p['experts']).T * np.exp(min(p['temperature'], math.log(100)))
  noisy = clean + normal(clean.shape) / 4
  weights, losses = [], []
  for g in range(G):
    gates, expert = softmax(noisy[g]), best(noisy[g], 1)
    kept = queued(expert, VALID[g][:, None], 4, 39, reference.batch_prioritized(at(gates, expert)))
    weights.append(dense(expert, at(gates, expert), kept, 4))
    probs = softmax(clean[g])
    lifted = norm.cdf((probs - at(noisy[g], expert)) * 4)
    # Unbiased variances: 4/3 times the others.
    losses.append(sum(4 / 3 * variation(amount[VALID[g]].sum(0)) for amount in (probs, lifted)) / 2)
  return np.array(weights), dict(tutel=0.01 * np.mean(losses))


def widenet(p):  # ceil(101*2*1.2/4) = 61
  noisy = X @ p['kernel'] + normal((G, S, 4)) / 4
  weights = []
  for g in range(G):
    expert = best(noisy[g], 2)
    kept = queued(expert, np.repeat(VALID[g][:, None], 2, 1), 4, 61, by_position(expert))
    weights.append(dense(expert, at(softmax(noisy[g]), expert), kept, 4))
  return np.array(weights), dict(
      switch=0.01 * group_mean(lambda g: balance(softmax(noisy[g]), best(noisy[g], 2), VALID[g])))


def switch(p):  # int(101*1.25/4) = 31
  logits = X * (0.99 + 0.02 * uniform(X.shape)) @ p['kernel']
  weights = []
  for g in range(G):
    expert = best(logits[g], 1)
    kept = queued(expert, VALID[g][:, None], 4, 31, by_position(expert))
    weights.append(dense(expert, at(softmax(logits[g]), expert), kept, 4))
  return np.array(weights), dict(switch=0.01 * first_choices_loss(logits))


def gshard(p):  # ceil(2*101/4) = 51 slots
  logits = X @ p['kernel']
  second = lambda share, probability, g: uniform((G, S))[g] < 2 * share
  return top_2_placed(logits, second, 51, after=False), dict(switch=0.01 * first_choices_loss(logits))


def st_moe(p):  # int(101*1.25/4) = 31 slots
  logits = X @ p['kernel']
  second = lambda share, probability, g: uniform((G, S))[g] < share / 0.2
  return top_2_placed(logits, second, 31, after=False), dict(
      switch=0.01 * first_choices_loss(logits), z=0.001 * np.mean(logsumexp(logits, axis=-1)[VALID]**2))


def lucidrains(p):  # the same, but that the loss counts first choices that have a slot
  logits = X @ p['kernel']
  second = lambda share, probability, g: uniform((G, S, 1))[g, :, 0] < share / 0.2
  weights = top_2_placed(logits, second, 31, after=False)
  of_group = lambda g: 4 * softmax(logits[g])[VALID[g]].mean(0) @ np.array(
      [((best(logits[g], 1)[:, 0] == e) & (weights[g, :, e] > 0)).sum() / VALID[g].sum() for e in range(4)])
  return weights, dict(kept_switch=0.01 * group_mean(of_group),
                       z=0.001 * np.mean(logsumexp(logits, axis=-1)[VALID]**2))


def glam(p):  # int(101*2/4) = 50 slots, up to 52
  logits = X @ p['kernel']
  return top_2_placed(logits, always, 52, after=False), dict(switch=0.01 * first_choices_loss(logits))


def fairseq(p):  # 2*ceil(101/4) = 52 slots
  logits = X @ p['kernel']
  return top_2_placed(logits, always, 52, after=True), dict(switch=0.01 * first_choices_loss(logits))


def fairseq_random_before(p):
  logits = X @ p['kernel']
  second = lambda share, probability, g: uniform((G, S, 1))[g, :, 0] < 2 * share
  return top_2_placed(logits, second, 52, after=False), dict(switch=0.01 * first_choices_loss(logits))


def fairseq_random(p):
  logits = X @ p['kernel']
  second = lambda share, probability, g: uniform((G, S, 1))[g, :, 0] < 2 * probability
  return top_2_placed(logits, second, 52, after=True), dict(switch=0.01 * first_choices_loss(logits))


def deepspeed(p):  # ceil(101/4) = 26 slots, for the tokens with the largest draws
  logits = X @ p['kernel']
  weights = []
  for g in range(G):
    expert = best(logits[g], 1)
    queue = [(int(token), 0) for token in np.argsort(-uniform((G, S))[g], kind='stable')]
    kept = queued(expert, VALID[g][:, None], 4, 26, queue)
    weights.append(dense(expert, at(softmax(logits[g]), expert), kept, 4))
  return np.array(weights), dict(switch=0.01 * first_choices_loss(logits))


def deepspeed_top_2(p):  # ceil(101/4*2) = 51 slots; the second expert is drawn from all but the first
  logits = X @ p['kernel']
  weights = []
  for g in range(G):
    first = best(logits[g], 1)
    drawn = logits[g] + gumbel((G, S, 4))[g]
    np.put_along_axis(drawn, first, -np.inf, axis=-1)
    expert = np.concatenate([first, best(drawn, 1)], axis=1)
    kept = queued(expert, np.repeat(VALID[g][:, None], 2, 1), 4, 51, by_position(expert))
    weights.append(dense(expert, at(softmax(logits[g]), expert), kept, 4))
  weights = np.array(weights)
  return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), dict(switch=0.01 * first_choices_loss(logits))


def deepspeed_top_3(p):  # ceil(101/4*3) = 76 slots, for the largest probabilities
  logits = X @ p['kernel']
  weights = []
  for g in range(G):
    expert = best(logits[g], 3)
    gate = at(softmax(logits[g]), expert)
    kept = queued(expert, np.repeat(VALID[g][:, None], 3, 1), 4, 76, reference.by_probability(gate))
    weights.append(dense(expert, gate, kept, 4))
  weights = np.array(weights)
  return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), dict(
      switch=0.01 * group_mean(lambda g: balance(softmax(logits[g]), best(logits[g], 3), VALID[g])))


def fastmoe(p):  # floor(ceil(1.2*101)*2/4) = 61 slots, token by token; one loss for all groups
  logits = X @ p['kernel'] + p['bias']
  weights = []
  for g in range(G):
    expert = best(logits[g], 2)
    gate = shares(at(softmax(logits[g]), expert))
    routed = VALID[g][:, None] & np.stack([np.ones(S, bool), uniform((G, S))[g] < 2 * gate[:, 1]], 1)
    weights.append(dense(expert, gate, queued(expert, routed, 4, 61, reference.token_major(S, 2)), 4))
  flat = lambda a: a.reshape(G * S, -1)
  loss = balance(flat(softmax(logits)), best(flat(logits), 1), VALID.ravel())
  return np.array(weights), dict(fastmoe=0.01 * loss)


def fastmoe_switch(p):  # ceil(1.2*101/4) = 31 slots; the loss counts surviving tokens, in both denominators
  logits = X @ p['kernel'] + p['bias'] + 0.2 * uniform((G, S, 4)) - 0.1
  weights = []
  for g in range(G):
    expert = best(logits[g], 1)
    kept = queued(expert, VALID[g][:, None], 4, 31, by_position(expert))
    weights.append(dense(expert, at(softmax(logits[g]), expert), kept, 4))
  weights = np.array(weights)
  survive = (weights > 0).sum((0, 1))
  loss = 4 * (survive / survive.sum()) @ softmax(logits)[VALID].sum(0) / survive.sum()
  return weights, dict(fastmoe=0.01 * loss)


def mixtral(p):  # no capacity; the loss is of all groups together, and sums to k
  logits = X @ p['kernel']
  flat = logits.reshape(G * S, 4)
  expert = best(flat, 2)
  weights = dense(expert, shares(at(softmax(flat), expert)), np.repeat(VALID.reshape(-1, 1), 2, 1), 4)
  return weights.reshape(G, S, 4), dict(switch=0.02 * 2 * balance(softmax(flat), expert, VALID.ravel()))


def loss_free(p):  # 6 of 8 experts by gate and bias, weighted by the gate
  gates = 1 / (1 + np.exp(-(X @ p['kernel']).reshape(G * S, 8)))
  expert = best(gates + p['bias'], 6)
  return dense(expert, at(gates, expert), np.repeat(VALID.reshape(-1, 1), 6, 1), 8).reshape(G, S, 8), {}


def sparsely_gated(p):  # 4 of 8
  clean = X @ p['kernel']
  std = np.log1p(np.exp(X @ p['noise_kernel'])) + 0.01
  noisy = clean + std * normal(clean.shape)
  weights = np.zeros((G, S, 8))
  for g, s in zip(*np.nonzero(VALID)):
    expert = np.argsort(-noisy[g, s])[:4]
    weights[g, s, expert] = softmax(noisy[g, s, expert])
  load = (in_top_k(noisy, clean, std, 4) * VALID[..., None]).sum(1)
  return weights, dict(gate_importance=0.1 * group_mean(lambda g: variation(weights[g].sum(0))),
                       smooth_load=0.1 * group_mean(lambda g: variation(load[g])))


def s_base(p):  # 20 scalings with epsilon 1; ceil(2*101/4) = 51 slots
  logits = X @ p['kernel']
  weights = []
  for g in range(G):
    scores, columns = logits[g][VALID[g]], np.zeros(4)
    for _ in range(20):
      rows = -logsumexp(scores + columns, axis=1)
      columns = math.log(len(scores) / 4) - logsumexp(scores + rows[:, None], axis=0)
    expert = np.zeros((S, 1), int)
    expert[VALID[g], 0] = (scores + columns).argmax(1)
    kept = queued(expert, VALID[g][:, None], 4, 51, by_position(expert))
    weights.append(dense(expert, at(softmax(logits[g]), expert), kept, 4))
  return np.array(weights), {}


def task_aware(p):
  logits = np.concatenate([X, p['embedding'][TASKS]], axis=-1) @ p['kernel']
  flat = logits.reshape(G * S, 4)
  expert = best(flat, 2)
  weights = dense(expert, shares(at(softmax(flat), expert)), np.repeat(VALID.reshape(-1, 1), 2, 1), 4)
  return weights.reshape(G, S, 4), dict(switch=0.01 * first_choices_loss(logits))


def speech_moe(p):
  probs = softmax(np.concatenate([SHARED, X], axis=-1) @ p['kernel'])
  weights = np.where(probs == probs.max(-1, keepdims=True), probs, 0) * VALID[..., None]
  real = probs[VALID]
  return weights, dict(sparsity=0.15 * (real.sum(-1) / np.sqrt((real**2).sum(-1))).mean(),
                       mean_importance=0.15 * 4 * (real.mean(0)**2).sum())


def expert_choice(p):  # ceil(2*101/4) = 51 tokens an expert
  probs = np.where(VALID[..., None], softmax(X @ p['kernel']), 0)
  weights = np.zeros(probs.shape)
  for g in range(G):
    for e in range(4):
      token = np.argsort(-probs[g, :, e], kind='stable')[:51]
      weights[g, token, e] = probs[g, token, e]
  return weights, {}


def moe_2d(p):
  """4 groups of 4 experts. int(101*1.25/4) = 31 slots of a group, int(31*1/4) = 7 of an expert."""
  outer, inner = X @ p['outer'], np.einsum('gsd,dnm->gsnm', X, p['inner'])
  draw = uniform((G, S))
  weights, losses = np.zeros((G, S, 16)), []
  for g in range(G):
    groups = best(outer[g], 2)
    of_groups = shares(at(softmax(outer[g]), groups))
    second_group = draw[g] < of_groups[:, 1] / 0.2
    in_group, entries = queued(groups, VALID[g][:, None] & np.stack([VALID[g], second_group], 1), 4, 31,
                               by_position(groups)), []
    for s in range(S):
      first, second = groups[s]
      inside = np.argsort(-inner[g, s, first], kind='stable')[:2]
      gate = softmax(inner[g, s, first, inside])
      entries.append([(first, inside[0], of_groups[s, 0] * gate[0], in_group[s, 0]),
                      (first, inside[1], of_groups[s, 0] * gate[1], in_group[s, 0] and draw[g, s] < gate[1] / 0.2),
                      (second, inner[g, s, second].argmax(), of_groups[s, 1], in_group[s, 1])])
    group, inside, gate, has_slot = (np.array([[entry[i] for entry in token] for token in entries]) for i in range(4))
    expert = (4 * group + inside).astype(int)
    weights[g] = dense(expert, gate, queued(expert, has_slot.astype(bool), 16, 7, by_position(expert)), 16)
    first = groups[:, 0]
    losses.append((balance(softmax(outer[g]), groups[:, :1], VALID[g]), {
        n: balance(softmax(inner[g, :, n]), best(inner[g, :, n], 1), VALID[g] & (first == n)) for n in range(4)
        if (VALID[g] & (first == n)).any()}))
  # Of the experts of a group: a mean over the routing groups in which it is the first choice of some token.
  of_experts = [np.mean([of[n] for _, of in losses if n in of]) for n in range(4)]
  return weights, dict(hierarchical_switch=0.01 * (np.mean([of for of, _ in losses]) + np.mean(of_experts)))


def hierarchical(p):  # 2 of 16 groups, 2 of the 3 experts of each
  levels = {}
  for level, names in dict(outer='n', inner='nm').items():
    clean, noise = (np.einsum(f'gsd,d{names}->gs{names}', X, p[name]) for name in (level, f'{level}_noise'))
    std = np.log1p(np.exp(noise)) + 0.01
    levels[level] = clean + std * normal(clean.shape), clean, std
  outer, inner = levels['outer'][0], levels['inner'][0]
  weights, visits = np.zeros((G, S, 48)), np.zeros((G, S, 16))
  for g, s in zip(*np.nonzero(VALID)):
    groups = np.argsort(-outer[g, s])[:2]
    for group, of_group in zip(groups, softmax(outer[g, s, groups])):
      experts = np.argsort(-inner[g, s, group])[:2]
      weights[g, s, 3 * group + experts] = of_group * softmax(inner[g, s, group, experts])
      visits[g, s, group] = 1
  load = (in_top_k(*levels['outer'], 2) * VALID[..., None]).sum(1) / np.maximum(visits.sum(1), 1)
  load = load[..., None] * (visits[..., None] * in_top_k(*levels['inner'], 2)).sum(1)
  return weights, dict(gate_importance=0.1 * group_mean(lambda g: variation(weights[g].sum(0))),
                       hierarchical_load=0.1 * group_mean(lambda g: variation(load[g])))


def xmoe(p):  # 16 dimensions; the loss at a temperature of 0.07 whatever has been learned
  unit = lambda rows: rows / np.maximum(np.sqrt((rows**2).sum(-1, keepdims=True)), 1e-4)
  cosine = unit(X @ p['kernel']) @ unit(p['experts']).T
  weights = np.where(cosine == cosine.max(-1, keepdims=True), 1 / (1 + np.exp(-cosine / p['temperature'])), 0)
  loss = group_mean(lambda g: balance(softmax(cosine[g] / 0.07), best(cosine[g], 1), VALID[g]))
  return weights * VALID[..., None], dict(fixed_temperature=0.01 * (loss + 4e-6))


def mtf_expert_choice(p):  # int(101*1.25/4) = 31 tokens an expert
  logits = X * (0.99 + 0.02 * uniform(X.shape)) @ p['kernel']
  weights, losses = np.zeros(logits.shape), []
  for g in range(G):
    over_tokens = softmax(np.where(VALID[g][:, None], logits[g], -np.inf), axis=0)
    for e in range(4):
      token = np.argsort(-over_tokens[:, e], kind='stable')[:31]
      weights[g, token, e] = over_tokens[token, e]
    weights[g] /= np.maximum((weights[g] > 0).sum(-1, keepdims=True), 1)
    losses.append(VALID[g].sum() * (over_tokens.mean(-1)**2).sum())
  return weights, dict(tokens=0.01 * np.mean(losses))


def rl_routing(p):
  logits = X @ p['kernel']
  expert = (logits + gumbel(logits.shape)).argmax(-1)[..., None]
  weights = np.zeros(logits.shape)
  np.put_along_axis(weights, expert, np.take_along_axis(softmax(logits), expert, -1), -1)
  return weights * VALID[..., None], dict(
      switch=0.01 * group_mean(lambda g: balance(softmax(logits[g]), expert[g], VALID[g])))


FRAGMENTS = {
    'vmoe': (vmoe, {}, 4), 'limoe': (limoe, {}, 32), 'gmoe': (gmoe, {}, 4), 'widenet': (widenet, {}, 4),
    'switch': (switch, {}, 4), 'gshard': (gshard, {}, 4), 'st_moe': (st_moe, {}, 4), 'glam': (glam, {}, 4),
    'lucidrains': (lucidrains, {}, 4), 'fairseq': (fairseq, {}, 4),
    'fairseq random': (fairseq_random, dict(second='random'), 4),
    'fairseq random before': (fairseq_random_before, dict(second='random', renormalize='before'), 4),
    'deepspeed': (deepspeed, {}, 4), 'deepspeed 2': (deepspeed_top_2, dict(k=2), 4),
    'deepspeed 3': (deepspeed_top_3, dict(k=3), 4), 'fastmoe': (fastmoe, {}, 4),
    'fastmoe switch': (fastmoe_switch, dict(gate='switch'), 4), 'top_k_dropless': (mixtral, {}, 4),
    'loss_free': (loss_free, {}, 8), 'sparsely_gated': (sparsely_gated, {}, 8), 's_base': (s_base, {}, 4),
    'task_aware': (task_aware, dict(num_tasks=3), 4), 'speech_moe': (speech_moe, dict(shared_dim=5), 4),
    'expert_choice': (expert_choice, {}, 4), 'moe_2d': (moe_2d, {}, 16),
    'hierarchical': (hierarchical, {}, 48), 'xmoe': (xmoe, {}, 4), 'mtf_expert_choice': (mtf_expert_choice, {}, 4),
    'rl_routing': (rl_routing, {}, 4),
}


@pytest.mark.parametrize('name', FRAGMENTS)
def test_a_training_step_is_that_of_the_loop_losses_included(name):
  loop, arguments, num_experts = FRAGMENTS[name]
  fragment = getattr(papers, name.split()[0])(**arguments)
  output, params = route(fragment, num_experts)
  weights, losses = loop(params)
  np.testing.assert_allclose(output.plan.to_dense().weight, weights, atol=2e-5)
  assert set(output.losses) == set(losses)
  for loss, value in losses.items():
    assert float(output.losses[loss]) == pytest.approx(value, rel=1e-4), loss
  if name == 's_base':  # a balanced plan leaves slots free
    assert output.plan.capacity == 51
  elif 'capacity' in fragment['place']['name']:
    assert output.metrics['dropped'] > 0.01  # or the capacity would not show


def test_soft_moe_mixes_tokens_into_a_slot_of_each_expert_and_slots_into_tokens():
  output, params = route(papers.soft_moe(), 4)
  unit = lambda a, axis: a / np.sqrt((a**2).sum(axis, keepdims=True) + 1e-6)
  logits = params['scale'] * np.einsum('gsd,dec->gsec', unit(X.astype(np.float64), -1), unit(params['phi'], 0))
  valid = VALID[..., None, None]
  np.testing.assert_allclose(output.plan.dispatch, softmax(np.where(valid, logits, -np.inf), axis=1), atol=1e-6)
  np.testing.assert_allclose(output.plan.combine, softmax(logits, axis=2) * valid, atol=1e-6)
  assert logits.shape[-1] == 1 and output.losses == {}


def test_loss_free_s_bias_steps_by_a_thousandth_against_the_load():
  output, params = route(papers.loss_free(), 8)
  load = np.asarray(output.plan.shares()).sum((0, 1))
  stepped = params['bias'] + 1e-3 * np.sign(load.mean() - load)
  np.testing.assert_allclose(output.updates['balance']['bias']['bias'], stepped, atol=1e-6)


def test_base_is_balanced_and_weighs_by_the_sigmoid_of_the_affinity():
  output, params = route(papers.base(), 4)
  weights = np.asarray(output.plan.to_dense().weight)
  sigmoid = 1 / (1 + np.exp(-(X @ params['kernel'])))
  np.testing.assert_allclose(weights, np.where(weights > 0, sigmoid, 0), atol=1e-5)
  np.testing.assert_array_equal((weights > 0).sum(1), VALID.sum(1)[:, None] / np.full(4, 4))
  assert output.losses == {}
