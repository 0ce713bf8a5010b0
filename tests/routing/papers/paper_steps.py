"""One training step of a whole router with known draws, and the common parts of papers, for one group, in float64."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from moejax import functional
from moejax.routing import router
from moejax.routing.inputs import RouterInputs
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
