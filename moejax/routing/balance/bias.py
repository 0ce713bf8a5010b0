"""Balancing without a loss: a bias on the selection."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from moejax import functional
from moejax.ranges import NonNegative
from moejax.routing.balance.requirements import choosing
from moejax.routing.stages import BALANCERS, Balancer, Routed, Scores


def bias_step(bias: Float[Array, '*L E'], load: Float[Array, '*L E'], rate: float) -> Float[Array, '*L E']:
  """One step of loss-free balancing: `b_e + rate * sign(mean(load) - load_e)` (Algorithm 1 of its paper).

  Args:
    bias: <float32>[..., E].
    load: <float32>[..., E] number of choices of every expert in the whole batch.
    rate: u.
  """
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


@dataclasses.dataclass(frozen=True)
class BiasStep:
  """`bias_step` with a fixed rate."""
  rate: float

  def __call__(self, bias: Float[Array, '*L E'], load: Float[Array, '*L E']) -> Float[Array, '*L E']:
    return bias_step(bias, load, self.rate)


@BALANCERS('bias')
class Bias(Balancer):
  """A bias on the selection scores, never on the weights, stepped against the load (loss-free balancing, section 3).

  It is added to the gates (sigmoid or softmax), not to the logits.

  Config:
    rate: u, the size of a step.
  """

  def __init__(self, *, k: int | None, num_experts: int, rate: NonNegative = 1e-3):
    choosing(k)
    self.rate = rate
    self.bias = functional.router_state(jnp.zeros(num_experts), (None,))

  def adjust(self, scores: Scores, gates: Float32[Array, 'G S E']) -> Scores:
    return dataclasses.replace(scores, select=gates + jax.lax.stop_gradient(self.bias[...]))

  def update(self, routed: Routed) -> dict[str, functional.Statistics]:
    return {'bias': functional.Statistics(routed.plan.shares().sum((0, 1)), BiasStep(self.rate))}
