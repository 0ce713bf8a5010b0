"""Imbalance of probabilities or weights."""
import jax
from jaxtyping import Array, Bool, Float32

from moejax.ranges import NonNegative
from moejax.routing.balance.imbalance import imbalance, squared_coefficient_of_variation
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import group_mean, over_tokens, token_mean


def importance_loss(logits: Float32[Array, 'G S E'], valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """CV^2 over experts of their total probability (Shazeer et al., equation 7; V-MoE, appendix A). 0 at uniform.

  Args:
    logits: <float32>[G,S,E], without noise.
    valid: <bool>[G,S].
  """
  importance = token_mean(jax.nn.softmax(logits, axis=-1), valid)
  return group_mean(squared_coefficient_of_variation(importance), valid)


@BALANCERS('importance')
class Importance(Balancer):
  """See `importance_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return importance_loss(routed.scores.clean, routed.valid)


@BALANCERS('gate_importance')
class GateImportance(Balancer):
  """CV^2 over experts of their total combine weights (equations 6-7): sparse, and with noise.

  V-MoE's 'importance' uses the softmax over all experts, without noise.
  """

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return imbalance(over_tokens(routed.plan.to_dense().weight, routed.valid), routed.valid)
