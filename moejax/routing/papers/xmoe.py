"""X-MoE: low-dimensional cosine routing against representation collapse."""
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.ranges import NonNegative, Positive
from moejax.routing.balance.requirements import choosing
from moejax.routing.balance.switch import switch_loss
from moejax.routing.papers import paper
from moejax.routing.stages import BALANCERS, Balancer, Routed


def fixed_temperature_loss(cosine: Float32[Array, 'G S E'], expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S K'],
                           valid: Bool[Array, 'G S'], temperature: float) -> Float32[Array, '']:
  """`E sum_e (F_e + 1e-6) P_e`, where P_e is the mean of a softmax over cosines at a fixed temperature.

  F_e is the share of first choices. As in the authors' code, now maintained by others; 1 + 1e-6 E at uniform routing.

  Args:
    cosine: <float32>[G,S,E].
    expert: <int32>[G,S,K].
    routed: <bool>[G,S,K].
    valid: <bool>[G,S].
    temperature: fixed, independent of the router's learned one.
  """
  probs = jax.nn.softmax(cosine / temperature, axis=-1)
  # The probabilities sum to 1, so adding 1e-6 to every share adds the constant E * 1e-6, without a gradient.
  some = valid.any(axis=1)
  added = 1e-6 * cosine.shape[-1] * some.sum() / jnp.maximum(some.sum(), 1)
  return switch_loss(probs, expert, routed, valid, 'fairseq') + added


@BALANCERS('fixed_temperature')
class FixedTemperature(Balancer):
  """See `fixed_temperature_loss`; for score 'cosine'.

  Config:
    temperature: divides the cosines.
  """

  reads = ('cosine',)

  def __init__(self, *, k: int | None, coefficient: NonNegative, temperature: Positive = 0.07):
    choosing(k)
    self.coefficient, self.temperature = coefficient, temperature

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return fixed_temperature_loss(routed.scores.extras['cosine'], routed.plan.expert, routed.plan.kept, routed.valid,
                                  self.temperature)


@paper('On the Representation Collapse of Sparse Mixture of Experts', '2204.09179', example=dict(dim=6))
def xmoe(form: Literal['paper', 'torchscale'] = 'paper', dim: int = 16, balance: float = 0.01) -> dict[str, Any]:
  """On the Representation Collapse of Sparse Mixture of Experts (arXiv 2204.09179).

  Section 3: tokens are projected to `dim` dimensions (half the number of experts in the paper, 16 for 32) and compared
  with expert embeddings on the unit sphere, divided by a learned temperature. The best expert's weight is the sigmoid
  of its score, and the remaining share of the token bypasses the expert: use experts `residual_stack`, inserted. The
  authors' later release in torchscale (form='torchscale') differs: only experts have unit length, there is no
  temperature, and otherwise it is a Switch router with fairseq's capacity.
  """
  project = dict(name='cosine', project=dim, epsilon=1e-4, init='orthogonal')
  if form == 'torchscale':
    return dict(
        score=project | dict(normalize='experts', init_scale=0.32, rescale=1.5),
        select=dict(name='top_k', k=1),
        weigh=dict(name='softmax', order='before', renormalize='never'),
        place=dict(name='capacity', capacity_factor=1., eval_capacity_factor=0.25, convention='fairseq'),
        balance=dict(switch=dict(coefficient=balance, convention='fairseq')))
  return dict(
      score=project | dict(normalize='both', init_scale=0.1, temperature='divide', temperature_init=0.07),
      select=dict(name='top_k', k=1),
      weigh=dict(name='sigmoid', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(fixed_temperature=dict(coefficient=balance)))
