"""Papers' routers as float64 loops, with their defaults: parameters -> (weights [G,S,E], weighted losses).

The comments derive the numbers of slots for 101 tokens and 4 experts by the formula of each codebase.
"""
import math

import numpy as np
from scipy.special import logsumexp
from scipy.stats import norm

from paper_steps import (G, IMAGES, S, SHARED, TASKS, VALID, X, always, at, balance, best, by_position, dense,
                         first_choices_loss, group_mean, gumbel, in_top_k, normal, queued, shares, top_2_placed,
                         uniform, variation)
import routing_reference as reference
from routing_reference import softmax


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


def limoe(p):  # ceil(101*1.05/24) = 5, up to 8
  weights, losses = vmoe(p, k=1, slots=8, num_experts=24)
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
