"""The router z-loss."""
import jax
from jaxtyping import Array, Bool, Float32

from moejax.ranges import NonNegative
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import valid_mean


def z_loss(logits: Float32[Array, 'G S E'], valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """Mean over valid tokens of `logsumexp(logits)^2` (ST-MoE, equation 5). `(ln E)^2` at zero logits.

  Args:
    logits: <float32>[G,S,E].
    valid: <bool>[G,S].
  """
  return valid_mean(jax.nn.logsumexp(logits, axis=-1)**2, valid)


@BALANCERS('z')
class Z(Balancer):
  """See `z_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return z_loss(routed.scores.clean, routed.valid)
