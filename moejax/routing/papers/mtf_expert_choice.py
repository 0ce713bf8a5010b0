"""Mesh TensorFlow's Expert Choice: softmax over tokens, an average over experts, and a loss."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.ranges import NonNegative, Positive
from moejax.routing.papers import paper
from moejax.routing.place import conventions
from moejax.routing.plans import Leak, Plan, slot_plan
from moejax.routing.select.expert_choice import expert_choice
from moejax.routing.stages import BALANCERS, SELECTIONS, Balancer, Routed, Scores, Selection
from moejax.routing.valid_tokens import group_mean


def softmax_over_tokens(logits: Float32[Array, '... E'], valid: Bool[Array, 'G S']) -> Float32[Array, 'G S E']:
  """<float32>[G,S,E] -> the same shape, summing to 1 over the valid tokens <bool>[G,S] of a group; 0 elsewhere."""
  valid = valid[..., None]
  return jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min), axis=1) * valid


def token_balance_loss(logits: Float32[Array, 'G S E'], valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """`n sum_t P_t^2`, where P_t is the mean over experts of their softmax over the n tokens: 1 for equal shares.

  The loss of `_expert_selection_gating` in Mesh TensorFlow, averaged over groups (here over groups with valid tokens).

  Args:
    logits: <float32>[G,S,E].
    valid: <bool>[G,S].
  """
  share = softmax_over_tokens(logits, valid).mean(-1)
  return group_mean(valid.sum(1) * jnp.sum(share**2, axis=1), valid)


@BALANCERS('tokens')
class TokenBalance(Balancer):
  """See `token_balance_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return token_balance_loss(routed.scores.logits, routed.valid)


@SELECTIONS('mtf_expert_choice')
@dataclasses.dataclass(frozen=True)
class MtfExpertChoice(Selection):
  """Every expert takes its C best tokens, weighted by its softmax over tokens divided by the token's number of experts.

  The weights are computed here, where padding is known; `weigh=dict(name='one')` keeps them.

  Config:
    capacity_factor: for Mesh TensorFlow's capacity C, at least 4.
    eval_capacity_factor: the factor at evaluation.
  """
  num_experts: int
  capacity_factor: Positive = 1.25
  eval_capacity_factor: Positive = 2.

  k = None

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    tokens = valid.shape[1]
    factor = 'capacity_factor' if train else 'eval_capacity_factor'
    slots = conventions.slots_that_choose(tokens, self.num_experts, getattr(self, factor), factor,
                                        'mesh_tensorflow')
    token, filled = expert_choice(scores.select, valid, slots)
    plan = slot_plan(token, filled, tokens)
    experts = jnp.maximum(plan.shares().sum(-1, keepdims=True), 1)
    return plan.scale(plan.pick(softmax_over_tokens(scores.logits, valid) / experts))


@paper('Mixture-of-Experts with Expert Choice Routing', '2202.09368', chooses='expert', draws=True)
def mtf_expert_choice(capacity_factor: float = 1.25, eval_capacity_factor: float = 2.) -> dict[str, Any]:
  """Expert Choice (arXiv 2202.09368) as in `expert_selection` of Mesh TensorFlow, which differs from the paper.

  The softmax is over the tokens of a group, not over experts; the output is a mean over the experts of a token, not a
  sum; a loss with coefficient 0.01 balances tokens. Input jitter of 1e-2 (its default policy) in training.
  """
  return dict(
      score=dict(name='linear', init_std=0.02, jitter=0.01),
      select=dict(name='mtf_expert_choice', capacity_factor=capacity_factor,
                  eval_capacity_factor=eval_capacity_factor),
      weigh=dict(name='one'),
      place=dict(name='dropless'),
      balance=dict(tokens=0.01))
