"""Experts choose tokens (Expert Choice, arXiv 2202.09368)."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from moejax.ranges import Positive
from moejax.routing.place.conventions import Convention, slots_that_choose
from moejax.routing.plans import Leak, Plan, slot_plan
from moejax.routing.stages import SELECTIONS, Scores, Selection


def expert_choice(probs: Float32[Array, 'G S E'], valid: Bool[Array, 'G S'],
                  capacity: int) -> tuple[Int[Array, 'G E C'], Bool[Array, 'G E C']]:
  """Every expert takes its `capacity` tokens of highest probability (Expert Choice, equation 2).

  Args:
    probs: <float32>[G,S,E].
    valid: <bool>[G,S]; other tokens are never taken.
    capacity: C, at most S.

  Returns:
    token <int32>[G,E,C], best first, and filled <bool>[G,E,C].
  """
  wanted = jnp.where(valid[:, None], probs.swapaxes(1, 2), -jnp.inf)
  # Compilers partition a sort over groups and experts, but not `jax.lax.top_k`.
  token = jnp.argsort(-wanted, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)
  return token, jnp.take_along_axis(wanted, token, axis=-1) > -jnp.inf


@SELECTIONS('expert_choice')
@dataclasses.dataclass(frozen=True)
class ExpertChoice(Selection):
  """Every expert takes the C tokens with the largest softmax probability for it.

  Config:
    capacity_factor: c, average number of experts per token; C is the capacity for K = 1.
    convention: formula for C (`placement.capacity`).
  """
  num_experts: int
  capacity_factor: Positive = 2.
  convention: Convention = 'moejax'

  k = None

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    tokens = valid.shape[1]
    slots = slots_that_choose(tokens, self.num_experts, self.capacity_factor,
                                        'capacity_factor', self.convention)
    token, filled = expert_choice(jax.nn.softmax(scores.select, axis=-1), valid, slots)
    return slot_plan(token, filled, tokens)
