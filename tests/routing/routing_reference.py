"""Reference for the tests of routing: float64 loops over tokens, written from the papers' definitions."""
from flax import nnx
import jax
import numpy as np


def softmax(logits, axis=-1):
  exponentials = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis, keepdims=True))
  return exponentials / exponentials.sum(axis, keepdims=True)


def choice_major(tokens, choices):
  """All first choices in token order, then all second ones."""
  return [(token, choice) for choice in range(choices) for token in range(tokens)]


def token_major(tokens, choices):
  """All choices of a token before the next token's."""
  return [(token, choice) for token in range(tokens) for choice in range(choices)]


def batch_prioritized(gates):
  """Choice-major over tokens sorted by their largest gate; Python's sort is stable."""
  tokens = sorted(range(len(gates)), key=lambda token: -max(gates[token]))
  return [(token, choice) for choice in range(len(gates[0])) for token in tokens]


def by_probability(gates):
  """Choices sorted by their gate; first choices win ties."""
  return sorted(choice_major(*np.shape(gates)), key=lambda entry: -gates[entry[0]][entry[1]])


def fill_buffers(expert, routed, num_experts, capacity, queue):
  """`{(token, choice): slot}` of what is kept when the entries of `queue` arrive one after the other."""
  filled, kept = [0] * num_experts, {}
  for token, choice in queue:
    name = expert[token][choice]
    if routed[token][choice] and filled[name] < capacity:
      kept[token, choice] = filled[name]
      filled[name] += 1
  return kept


def dense_weights(plan):
  """[G,S,E] weight of every expert in every token's output, for all plans but soft ones."""
  plan = jax.device_get(plan)  # To read arrays of jax number by number takes a hundred times as long.
  if hasattr(plan, 'expert'):
    groups, tokens, choices = plan.expert.shape
    dense = np.zeros((groups, tokens, plan.num_experts))
    for g, s, k in np.ndindex(groups, tokens, choices):
      if plan.kept[g, s, k]:
        dense[g, s, plan.expert[g, s, k]] += plan.weight[g, s, k]
    return dense
  if hasattr(plan, 'token'):
    dense = np.zeros((plan.token.shape[0], plan.num_tokens, plan.num_experts))
    for g, e, c in np.ndindex(*plan.token.shape):
      if plan.filled[g, e, c]:
        dense[g, plan.token[g, e, c], e] += plan.weight[g, e, c]
    return dense
  return np.asarray(plan.weight, np.float64)


def outputs(plan, x):
  """[G,S,D] of a layer with this plan whose expert e computes tanh((1 + e) x)."""
  x = np.asarray(x, np.float64)
  if hasattr(plan, 'dispatch'):
    slots = np.einsum('gsec,gsd->gecd', np.asarray(plan.dispatch, np.float64), x)
    scale = 1 + np.arange(slots.shape[1])[:, None, None]
    return np.einsum('gsec,gecd->gsd', np.asarray(plan.combine, np.float64), np.tanh(scale * slots))
  dense = dense_weights(plan)
  return sum(dense[..., e, None] * np.tanh((1 + e) * x) for e in range(dense.shape[-1]))


def run(module, *arguments, **kwargs):
  """`module(*arguments, **kwargs)`, compiled as one program: op by op takes many times as long."""
  graph, state = nnx.split(module)
  return jax.jit(lambda state, arguments: nnx.merge(graph, state)(*arguments, **kwargs))(state, arguments)
