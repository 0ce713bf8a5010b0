"""Which choices get the slots: the position of each choice in its expert's queue."""
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.kernels.routes import by_expert

Order = Literal['choice', 'token']


def slots_in_order(expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S K'], num_experts: int,
                   order: Order = 'choice') -> Int[Array, 'G S K']:
  """The number of earlier choices of the same expert.

  Args:
    expert: <int32>[G,S,K].
    routed: <bool>[G,S,K]; other choices take no slot.
    num_experts: E.
    order: 'choice': all first choices, then all second ones, each in token order (GShard, V-MoE, flaxformer and
      their successors); 'token': all choices of a token before the next token, which is strictly causal.

  Returns:
    <int32>[G,S,K], undefined where not routed. Unique among the routed choices of an expert.
  """
  queue = (lambda array: array.swapaxes(1, 2)) if order == 'choice' else (lambda array: array)
  queued = queue(jnp.where(routed, expert, num_experts))
  slot = jax.vmap(lambda expert: _earlier(expert, num_experts))(queued.reshape(len(expert), -1))
  return queue(slot.reshape(queued.shape))


def _earlier(expert, num_experts):
  # A sort, because a cumsum over one-hots would need E times the memory.
  choices = by_expert(expert, num_experts)
  return choices.position - (jnp.cumsum(choices.sizes) - choices.sizes)[expert]


def _sorted_by(priority: jax.Array, place: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  # `place` of the rows of `arrays` sorted by descending priority (stable), returned in the original order.
  def take(array, rows):
    return jnp.take_along_axis(array, rows.reshape(rows.shape + (1,) * (array.ndim - 2)), axis=1)
  rows = jnp.argsort(-priority, axis=1, stable=True)
  return take(place(*(take(array, rows) for array in arrays)), jnp.argsort(rows, axis=1))


def slots_by_token_priority(expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S K'], num_experts: int,
                            priority: Float32[Array, 'G S'], order: Order = 'choice') -> Int[Array, 'G S K']:
  """`slots_in_order` after sorting tokens by `priority` <float32>[G,S], highest first.

  With a token's largest gate as priority this is Batch Prioritized Routing (V-MoE, section 4).
  """
  return _sorted_by(priority, lambda expert, routed: slots_in_order(expert, routed, num_experts, order), expert, routed)


def slots_by_choice_priority(expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S K'], num_experts: int,
                             priority: Float32[Array, 'G S K']) -> Int[Array, 'G S K']:
  """Slots in descending order of `priority` <float32>[G,S,K]: every expert keeps the choices of highest priority.

  With gates as priorities this is `switch_max` of Mesh TensorFlow, the policy 'probs' of DeepSpeed (since its commit
  853c938 of April 2026; see `papers.deepspeed`) and Megatron-LM's. First choices win ties.
  """
  def flat(array):
    return array.swapaxes(1, 2).reshape(len(array), -1, 1)
  groups, tokens, choices = expert.shape
  slot = _sorted_by(flat(priority)[..., 0], lambda expert, routed: slots_in_order(expert, routed, num_experts),
                    flat(expert), flat(routed))
  return slot.reshape(groups, choices, tokens).swapaxes(1, 2)
