"""All experts see all tokens, or mixtures of them."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.routing.plans import DensePlan, Leak, Plan, SoftPlan
from moejax.routing.stages import SELECTIONS, Scores, Selection


@SELECTIONS('all')
@dataclasses.dataclass(frozen=True)
class All(Selection):
  """Every expert sees every token: a dense mixture."""
  num_experts: int

  k = None

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    return DensePlan(jnp.broadcast_to(valid[..., None], (*valid.shape, self.num_experts)).astype(jnp.float32))


def soft_dispatch(logits: Float32[Array, 'G S E C'], valid: Bool[Array, 'G S']) -> Float32[Array, 'G S E C']:
  """Softmax over the tokens: the inputs of every slot (Soft MoE, equation 1).

  Args:
    logits: <float32>[G,S,E,C].
    valid: <bool>[G,S]; other tokens enter no slot.

  Returns:
    <float32>[G,S,E,C] summing to 1 over S wherever the group has a valid token.
  """
  valid = valid[..., None, None]
  return jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min), axis=1) * valid


@SELECTIONS('soft')
@dataclasses.dataclass(frozen=True)
class Soft(Selection):
  """Every slot is a mixture of the tokens (Soft MoE, equation 1)."""

  k = None
  reads_slots = True

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    combine = jnp.broadcast_to(valid[..., None, None], scores.logits.shape).astype(jnp.float32)
    return SoftPlan(dispatch=soft_dispatch(scores.select, valid), combine=combine)
