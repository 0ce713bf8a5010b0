"""Capped Expert Choice: experts choose tokens, with a cap on the experts per token."""
import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.config import ConfigError
from moejax.ranges import Above, AtMost, Count, Positive
from moejax.routing.papers import paper
from moejax.routing.papers.mtf_expert_choice import softmax_over_tokens
from moejax.routing.place import conventions
from moejax.routing.plans import Leak, Plan, slot_plan
from moejax.routing.select import optimal_transport
from moejax.routing.select.expert_choice import expert_choice
from moejax.routing.stages import SELECTIONS, Scores, Selection


def capped_plan(gates: Float32[Array, 'S E'], valid: Bool[Array, 'S'], slots: int, cap: float, epsilon: float,
                iterations: int) -> Float32[Array, 'S E']:
  """The relaxed choice A of equation 3: `slots` tokens per expert, at most `cap` experts per token.

  A dummy expert with score zero takes the rest of every token's `cap`, which fixes both marginals. With padding experts
  take fewer tokens: at most all valid tokens, or an equal share of the total cap.

  Args:
    gates: <float32>[S,E] probabilities, over experts or over tokens.
    valid: <bool>[S].
    slots: C.
    cap: b.
    epsilon: weight of the entropy.
    iterations: iterations of the solver (`optimal_transport.bounded`).

  Returns:
    <float32>[S,E] between 0 and 1.
  """
  num_experts = gates.shape[1]
  tokens = valid.astype(jnp.float32)
  count = tokens.sum()
  taken = jnp.minimum(jnp.minimum(slots, count), cap * count / num_experts)
  scores = jnp.pad(jnp.where(valid, gates.T, 0.), ((0, 1), (0, 0)))
  of_experts = jnp.append(jnp.full(num_experts, taken), cap * count - num_experts * taken)
  upper = jnp.append(jnp.ones(num_experts), cap)[:, None] * tokens
  return optimal_transport.bounded(scores, of_experts, cap * tokens, upper, epsilon, iterations)[:-1].T


Ranking = Literal['plan', 'plan_times_gate']


@SELECTIONS('capped_expert_choice')
@dataclasses.dataclass(frozen=True)
class CappedExpertChoice(Selection):
  """Every expert takes its C best tokens by a plan in which no token has more than `cap` experts.

  The cap is approximate: with a large epsilon, or few iterations, individual tokens exceed it.

  Config:
    capacity_factor: average number of experts per token.
    cap: maximum number of experts per token; at least `capacity_factor`.
    epsilon: weight of the entropy in the plan, at most 1.
    iterations: iterations of the solver.
    rank: 'plan' ranks tokens by the plan, as in the paper; 'plan_times_gate' by the plan times the gate, which is also
      the weight, as in lingvo, where gates and plan use a softmax over the tokens of a group; use
      `weigh=dict(name='one')`.
    convention: formula for C (`conventions.capacity`).
  """
  num_experts: int
  capacity_factor: Positive = 2.
  cap: Positive = 2.
  epsilon: Annotated[float, Above(0), AtMost(1)] = 0.001
  iterations: Count = 100
  rank: Ranking = 'plan'
  convention: conventions.Convention = 'moejax'

  k = None

  def __post_init__(self):
    if self.cap < self.capacity_factor:
      raise ConfigError(f'.cap = {self.cap} must be at least capacity_factor = {self.capacity_factor}, '
                        'the average number of experts per token.')

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    tokens = valid.shape[1]
    slots = conventions.slots_that_choose(tokens, self.num_experts, self.capacity_factor,
                                        'capacity_factor', self.convention)
    over_tokens = self.rank == 'plan_times_gate'
    gates = softmax_over_tokens(scores.select, valid) if over_tokens else jax.nn.softmax(scores.select, axis=-1)
    plan = jax.lax.stop_gradient(jax.vmap(
        lambda gates, valid: capped_plan(gates, valid, slots, self.cap, self.epsilon, self.iterations))(gates, valid))
    product = plan * gates
    token, filled = expert_choice(product if over_tokens else plan, valid, slots)
    chosen = slot_plan(token, filled, tokens)
    return chosen.scale(chosen.pick(product)) if over_tokens else chosen


@paper('Mixture-of-Experts with Expert Choice Routing', '2202.09368', chooses='expert',
       example=dict(capacity_factor=1.))
def capped_expert_choice(capacity_factor: float = 2., cap: float = 2., epsilon: float = 0.001, iterations: int = 100,
                         rank: Ranking = 'plan') -> dict[str, Any]:
  """Expert Choice with at most `cap` experts per token: section 3.3 of arXiv 2202.09368, equation 3.

  max <S, A> + epsilon H(A) over A between 0 and 1 with C tokens per expert and at most `cap` experts per token; then
  every expert takes its C best tokens by A, weighted by their probability. No auxiliary loss; not causal.
  lingvo's `OptimalTransportOnlogits` has epsilon = 0.1, 50 iterations and `rank='plan_times_gate'`: softmax over
  tokens, in bfloat16, and floor(S*2/E) slots.
  """
  weigh = dict(name='softmax', order='before', renormalize='never') if rank == 'plan' else dict(name='one')
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='capped_expert_choice', capacity_factor=capacity_factor, cap=cap, epsilon=epsilon,
                  iterations=iterations, rank=rank),
      weigh=weigh,
      place=dict(name='dropless'))
