"""FastMoE's SWIPE gate: top-k, with tokens moved from full experts to others."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.config import ConfigError
from moejax.ranges import Count
from moejax.routing.papers import paper
from moejax.routing.plans import Plan
from moejax.routing.select.assignment import TrainedTogether, within_shares
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import SELECTIONS, Scores


def swipe(expert: Int[Array, 'G S K'], valid: Bool[Array, 'G S'], num_experts: int) -> Int[Array, 'G S K']:
  """`within_shares` for each choice in turn, with slots shared by all choices (`SwipeGate` of FastMoE).

  First choices may take all slots of an expert, so only the total over choices is balanced; a moved token may get the
  same expert twice.

  Args:
    expert: <int32>[G,S,K].
    valid: <bool>[G,S].
    num_experts: E.

  Returns:
    <int32>[G,S,K] at most ceil(n*K/E) choices per expert, with n valid tokens in the group.
  """
  choices = expert.shape[-1]
  share = -(-valid.sum(1, keepdims=True) * choices // num_experts)
  slots, moved = jnp.broadcast_to(share, (len(expert), num_experts)), []
  for choice in range(choices):
    moved.append(within_shares(expert[..., choice], valid, slots))
    slots = slots - jnp.sum((moved[-1][..., None] == jnp.arange(num_experts)) & valid[..., None], axis=1)
  return jnp.stack(moved, axis=-1)


@SELECTIONS('swipe')
@dataclasses.dataclass(frozen=True)
class Swipe(TrainedTogether):
  """Training: the `k` best experts, or others if those are full (see `swipe`); evaluation: the `k` best.

  Config:
    k: experts per token.
  """
  k: Count

  def __post_init__(self):
    if self.k > self.num_experts:
      raise ConfigError(f'.k: a token cannot choose {self.k} of {self.num_experts} experts. '
                        f'Allowed: 1 to {self.num_experts}.')

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    expert = top_k(scores.select, self.k)
    return self.plan(swipe(expert, valid, self.num_experts) if train else expert, valid)


# Not exchangeable: moved tokens go to the lowest expert with a free slot.
@paper('FastMoE: A Fast Mixture-of-Expert Training System', '2103.13262', chooses='together', exchangeable=False,
       alone=dict(k=1))
def fastmoe_swipe(k: int = 2) -> dict[str, Any]:
  """The gate 'swipe' of FastMoE (arXiv 2103.13262); in its repository, not in the paper.

  Training: every expert computes exactly k/E of the tokens, because tokens beyond its share are moved; weights are a
  softmax over the logits of the token's final experts. Evaluation: plain top-k without a limit. The score has a bias,
  as in `NaiveGate`. Each worker has one expert here.
  """
  return dict(
      score=dict(name='linear', init_std='torch_linear', bias=True),
      select=dict(name='swipe', k=k),
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=dict(name='dropless'))
