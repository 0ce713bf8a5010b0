"""FastMoE's gates, as in its code on one worker; and FasterMoE's, which limits the tokens sent to other nodes."""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.config import ConfigError
from moejax.ranges import Count, Fraction, NonNegative
from moejax.routing.balance.requirements import choosing
from moejax.routing.papers import paper
from moejax.routing.plans import Leak, Plan, token_plan
from moejax.routing.select.top_k import TopK, top_k
from moejax.routing.stages import BALANCERS, SCORES, SELECTIONS, Balancer, Routed, Score, Scores, noiseless

Gate = Literal['naive', 'gshard', 'switch', 'dc', 'faster', 'zero']
Counts = Literal['best', 'surviving']


def fastmoe_loss(probs: Float32[Array, 'G S E'], expert: Int[Array, 'G S'], counted: Bool[Array, 'G S'],
                 valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """`E * sum_e F_e P_e` over all groups together; F and P are sums over tokens divided by the number counted.

  With all tokens counted this is GShard's loss on one worker (FastMoE has the squared number of experts of a worker in
  place of E^2); its Switch gate counts only tokens within capacity, in both denominators.

  Args:
    probs: <float32>[G,S,E].
    expert: <int32>[G,S], first choices.
    counted: <bool>[G,S].
    valid: <bool>[G,S]; other tokens enter neither sum.
  """
  number = jnp.maximum(counted.sum(), 1)
  share = jnp.sum((expert[..., None] == jnp.arange(probs.shape[-1])) & counted[..., None], axis=(0, 1)) / number
  return probs.shape[-1] * jnp.sum(share * jnp.where(valid[..., None], probs, 0).sum((0, 1)) / number)


@BALANCERS('fastmoe')
class FastMoELoss(Balancer):
  """See `fastmoe_loss`.

  Config:
    counts: 'best': every token, by its best expert (even if gate 'faster' sent it elsewhere); 'surviving': only tokens
      whose first choice is within capacity.
  """

  def __init__(self, *, k: int | None, coefficient: NonNegative, counts: Counts = 'best'):
    if counts == 'surviving':
      choosing(k)
    self.coefficient, self.counts = coefficient, counts

  def loss(self, routed: Routed) -> Float32[Array, '']:
    if self.counts == 'best':
      return fastmoe_loss(routed.probs, routed.scores.logits.argmax(-1), routed.valid, routed.valid)
    return fastmoe_loss(routed.probs, routed.placed.expert[..., 0], routed.placed.kept[..., 0], routed.valid)


def near_first(logits: Float32[Array, 'G S E'], local: Bool[Array, 'G E'], valid: Bool[Array, 'G S'],
               allowed: int) -> Int[Array, 'G S 2']:
  """Two experts per token, where at most `allowed` tokens have one on another node (FasterMoE's example gate).

  If fewer than `allowed` tokens prefer a remote expert, every token gets its best two. Otherwise the `allowed` of them
  with the largest logits get it second, after their best local expert, and all other tokens their best two local ones.

  Args:
    logits: <float32>[G,S,E].
    local: <bool>[G,E] which experts are on the group's node, at least two.
    valid: <bool>[G,S]; other tokens are not sent.
    allowed: number of tokens of a group.

  Returns:
    <int32>[G,S,2].
  """
  best = top_k(logits, 2)
  travels = ~jnp.take_along_axis(local, best[..., 0], axis=1) & valid
  near = top_k(jnp.where(local[:, None], logits, jnp.finfo(jnp.float32).min), 2)
  rank = jnp.argsort(jnp.argsort(jnp.where(travels, -logits.max(-1), jnp.inf), axis=1, stable=True), axis=1)
  limited = near.at[..., 1].set(jnp.where(travels & (rank < allowed), best[..., 0], near[..., 1]))
  few = travels.sum(1) < allowed
  return jnp.where(few[:, None, None], best, limited)


@SELECTIONS('near_first')
@dataclasses.dataclass(frozen=True)
class NearFirst(TopK):
  """See the function `near_first`. Nodes hold equal, consecutive shares of the experts and of the groups.

  Config besides `k`, which is 2:
    nodes: a divisor of the number of experts, with at least two experts per node.
    outgoing: share of a group's tokens that may be sent to other nodes (0.14 in FasterMoE).
  """
  nodes: Count = 1
  outgoing: Fraction = 0.14

  def __post_init__(self):
    super().__post_init__()
    if self.num_experts % self.nodes or self.num_experts < 2 * self.nodes or self.k != 2:
      raise ConfigError(f' requires k = 2 and at least two experts on each node, the same number on all; '
                        f'not k = {self.k} and {self.num_experts} experts on {self.nodes} nodes.')

  def leak(self, train: bool) -> Leak:
    return 'causal' if self.nodes == 1 else 'future'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    groups, tokens = valid.shape
    node_of_group = jnp.arange(groups) * self.nodes // groups
    node_of_expert = jnp.arange(self.num_experts) * self.nodes // self.num_experts
    local = node_of_group[:, None] == node_of_expert
    expert = near_first(scores.select, local, valid, int(tokens * self.outgoing))
    return token_plan(expert, valid[..., None], self.num_experts)


@SCORES('zero')
class Zero(Score):
  """Zeros: all tokens choose the first expert."""

  def __init__(self, *, num_experts: int):
    self.num_experts = num_experts

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D] or <int32>[G,S]; only their shape is used."""
    return noiseless(jnp.zeros((*features.shape[:2], self.num_experts)))


@paper('FastMoE: A Fast Mixture-of-Expert Training System', '2103.13262', draws=True,
       example=dict(capacity=(0.6, 0.6)), alone=dict(gate='switch'))
def fastmoe(gate: Gate = 'gshard', capacity: tuple[float, float] = (1.2, 2.4), balance: float = 0.01, nodes: int = 1,
            experts_per_worker: int = 1) -> dict[str, Any]:
  """FastMoE (arXiv 2103.13262), as in fmoe/gates; 'faster' is of FasterMoE (PPoPP 2022).

    naive    the best two logits, softmax over them; a linear gate with bias, initialised as in torch; no capacity, no
             loss
    gshard   naive, but the second is kept with probability min(1, 2*g2), at evaluation too; floor(ceil(factor*S)*2/E)
             slots, in token order; balance loss over first choices
    switch   U(-0.1, 0.1) on the logits in training (the code's U(0.9, 1.1) differs by a constant, which a softmax
             ignores), the best expert by probability, ceil(factor*S/E) slots; the loss counts tokens within capacity
    dc       gshard with ceil(factor*S) slots over the tokens of all workers, where S is one worker's number: for
             moe.group='batch', with `experts_per_worker`
    faster   naive, but at most 14% of a group's tokens are sent to another of the `nodes`; loss over first choices
    zero     all tokens to the first expert

  `capacity`: factors in training and at evaluation. FastMoE's 'noisy' is `sparsely_gated`, 'swipe' `fastmoe_swipe`.
  """
  train, evaluation = capacity
  score = dict(name='linear', init_std='torch_linear', bias=True)
  over_chosen = dict(name='softmax', order='after', renormalize='never')
  placed = lambda factor, eval_factor, convention: dict(
      name='capacity', capacity_factor=factor, eval_capacity_factor=eval_factor, convention=convention, order='token')
  random_second = dict(name='gshard_top_2', second='random', eval_second='random', threshold=0.5)
  shares = experts_per_worker / 2  # ceil(factor*S) of W workers are factor*n/2 equal shares of 2*S*W choices over n*W
  return {
      'naive': dict(score=score, select=dict(name='top_k', k=2), weigh=over_chosen),
      'gshard': dict(score=score, select=random_second, weigh=over_chosen, place=placed(train, evaluation, 'fastmoe'),
                     balance=dict(fastmoe=balance)),
      'switch': dict(score=score | dict(logit_jitter=0.1), select=dict(name='top_k', k=1), weigh=dict(name='softmax'),
                     place=placed(train, evaluation, 'fastmoe_switch'),
                     balance=dict(fastmoe=dict(coefficient=balance, counts='surviving'))),
      'dc': dict(score=score, select=random_second, weigh=over_chosen,
                 place=placed(train * shares, evaluation * shares, 'moejax'), balance=dict(fastmoe=balance)),
      'faster': dict(score=score, select=dict(name='near_first', k=2, nodes=nodes, outgoing=0.14), weigh=over_chosen,
                     balance=dict(fastmoe=balance)),
      'zero': dict(score=dict(name='zero'), select=dict(name='top_k', k=1), weigh=dict(name='one')),
  }[gate]
