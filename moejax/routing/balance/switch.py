"""The balance loss of Switch Transformer, as six codebases compute it."""
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.ranges import NonNegative
from moejax.routing.balance.requirements import choosing
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import group_mean, token_mean

Convention = Literal['moejax', 'gshard', 'fairseq', 'flaxformer', 'mixtral', 'deepspeed']


def switch_loss(probs: Float32[Array, 'G S E'], expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S K'],
                valid: Bool[Array, 'G S'], convention: Convention = 'moejax') -> Float32[Array, '']:
  """`E * sum_e F_e P_e`: P_e mean probability, F_e share of choices (Switch Transformer, equation 4).

      convention   F_e counts                            at uniform routing
      moejax       all K choices, sums to 1              1
      gshard       first choices                         1   (also Switch, Mesh TensorFlow, lingvo)
      fairseq      first choices                         1
      flaxformer   all K choices, sums to K              K
      mixtral      all K choices, sums to K, and F and   K
                   P are of all groups together
      deepspeed    first choices for K <= 2, else all    1
                   K choices, sums to 1

  Choices are counted before capacity. Only P has a gradient.

  Args:
    probs: <float32>[G,S,E] summing to 1 over E.
    expert: <int32>[G,S,K].
    routed: <bool>[G,S,K]; False: not a choice (padding, or a second expert that was not sampled).
    valid: <bool>[G,S].
    convention: one of the above.
  """
  num_experts, k = probs.shape[-1], expert.shape[-1]
  if convention in ('gshard', 'fairseq') or (convention == 'deepspeed' and k <= 2):
    expert, routed = expert[..., :1], routed[..., :1]
  if convention == 'mixtral':
    probs, expert, routed, valid = (a.reshape(1, -1, *a.shape[2:]) for a in (probs, expert, routed, valid))
  chosen = (expert[..., None] == jnp.arange(num_experts)) & routed[..., None]
  share = token_mean(chosen.sum(2).astype(jnp.float32), valid)
  if convention not in ('flaxformer', 'mixtral'):
    share /= jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  return group_mean(num_experts * jnp.sum(share * token_mean(probs, valid), axis=-1), valid)


@BALANCERS('switch')
class Switch(Balancer):
  """See `switch_loss`.

  Config:
    convention: what F_e counts; see `switch_loss`.
  """

  def __init__(self, *, k: int | None, coefficient: NonNegative, convention: Convention = 'moejax'):
    choosing(k)
    self.coefficient = coefficient
    self.convention: Convention = convention

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return switch_loss(routed.probs, routed.plan.expert, routed.plan.kept, routed.valid, self.convention)
