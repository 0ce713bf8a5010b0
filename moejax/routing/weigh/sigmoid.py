"""Sigmoid weights."""
import dataclasses

import jax
from jaxtyping import Array, Float32

from moejax.routing.logits import softmax_over_experts
from moejax.routing.stages import WEIGHTINGS
from moejax.routing.weigh.softmax import OverSelected


@WEIGHTINGS('sigmoid')
@dataclasses.dataclass(frozen=True)
class Sigmoid(OverSelected):
  """Sigmoid gates: experts do not compete for weight (sigma-MoE, loss-free balancing)."""

  def gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    return jax.nn.sigmoid(logits)

  def log_gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    return jax.nn.log_sigmoid(logits)

  def probs(self, logits: Float32[Array, 'G S E *C']) -> Float32[Array, 'G S E']:
    probs = softmax_over_experts(self.log_gates(logits))
    return probs.sum(-1) if probs.ndim == 4 else probs
