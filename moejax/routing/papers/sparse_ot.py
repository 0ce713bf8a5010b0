"""Sparsity-constrained optimal transport: selection by a transport plan with few non-zeros; and its two baselines."""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.config import ConfigError
from moejax.ranges import Count, Positive
from moejax.routing.papers import paper
from moejax.routing.place import conventions
from moejax.routing.plans import Leak, Plan, slot_plan, token_plan
from moejax.routing.select import optimal_transport
from moejax.routing.select.expert_choice import expert_choice
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import SELECTIONS, Scores, Selection

Regularizer = Literal['sparse', 'quadratic', 'entropy']


@dataclasses.dataclass(frozen=True)
class Transport(Selection):
  """Base class of selections by an optimal transport plan: mass 1 per token, equal shares per expert.

  Config:
    regularizer: 'sparse': quadratic, with as many non-zeros as are selected; 'quadratic': without that limit;
      'entropy': Sinkhorn on the logits; the other two use their softmax.
    strength: weight of the regulariser (gamma or epsilon).
    iterations: iterations of Adam or Sinkhorn.
    learning_rate: for Adam.
  """
  num_experts: int
  regularizer: Regularizer = 'sparse'
  strength: Positive = 1.
  iterations: Count = 20
  learning_rate: Positive = 1e-2

  def leak(self, train: bool) -> Leak:
    return 'future'

  def transport(self, scores: Scores, valid: Bool[Array, 'G S'], limit: int,
                side: Literal['tokens', 'experts']) -> Float32[Array, 'G S E']:
    """<float32>[G,S,E]; if sparse, with at most `limit` non-zeros for each member of `side`."""
    logits = jax.lax.stop_gradient(scores.select)

    def of_group(logits, valid):
      tokens = valid.astype(jnp.float32)
      experts = jnp.full(self.num_experts, tokens.sum() / self.num_experts)
      if self.regularizer == 'entropy':
        return optimal_transport.sinkhorn(logits, tokens, experts, self.strength, self.iterations)
      problem = jax.nn.softmax(logits, axis=-1), tokens, experts
      if side == 'tokens':
        problem = problem[0].T, experts, tokens
      k = limit if self.regularizer == 'sparse' else len(problem[1])
      plan = optimal_transport.sparse(*problem, k, self.strength, self.iterations, self.learning_rate)
      return plan if side == 'experts' else plan.T

    return jax.vmap(of_group)(logits, valid)


@SELECTIONS('transport_to_experts')
@dataclasses.dataclass(frozen=True)
class TransportToExperts(Transport):
  """Each expert takes the C tokens with the largest entries in its column of the plan, except zeros.

  Config besides that of `Transport`:
    capacity_factor: for C.
    convention: formula for C (`conventions.capacity`).
  """
  capacity_factor: Positive = 1.
  convention: conventions.Convention = 'vmoe'

  k = None

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    tokens = valid.shape[1]
    slots = conventions.slots_that_choose(tokens, self.num_experts, self.capacity_factor,
                                        'capacity_factor', self.convention)
    plan = self.transport(scores, valid, slots, 'experts')
    token, filled = expert_choice(plan, valid, slots)
    chosen = slot_plan(token, filled, tokens)
    return dataclasses.replace(chosen, filled=filled & (chosen.pick(plan) > 0))


@SELECTIONS('transport_to_tokens')
@dataclasses.dataclass(frozen=True)
class TransportToTokens(Transport):
  """Each token takes the `k` experts with the largest entries in its row of the plan, except zeros.

  Config:
    k: experts per token.
  """
  k: Count = 1

  def __post_init__(self):
    if self.k > self.num_experts:
      raise ConfigError(f'.k: a token cannot choose {self.k} of {self.num_experts} experts. '
                        f'Allowed: 1 to {self.num_experts}.')

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    plan = self.transport(scores, valid, self.k, 'tokens')
    expert = top_k(plan, self.k)
    chosen = token_plan(expert, valid[..., None], self.num_experts)
    return dataclasses.replace(chosen, kept=chosen.kept & (chosen.pick(plan) > 0))


@paper('Sparsity-Constrained Optimal Transport', '2209.15466', chooses='expert',
       example=dict(strength=2.))
def sparse_ot(regularizer: Regularizer = 'sparse', capacity_factor: float = 1., strength: float = 1.,
              iterations: int = 20) -> dict[str, Any]:
  """Sparsity-Constrained Optimal Transport (arXiv 2209.15466), section 6.

  Each expert takes the tokens of its column in a transport plan with at most C non-zeros per column; the plan selects,
  the softmax weighs. `KSparseProjectionTransportTopItemsPerExpertRouter` of google-research/vmoe: similarity is the
  softmax over experts, gamma = 1, 20 steps of Adam with learning rate 0.01. Its baselines: `regularizer='quadratic'`
  and 'entropy'. No auxiliary loss, no noise. Not causal. Tokens with a zero in the plan are not selected, as in the
  paper; the code fills free slots with such tokens, and weighs them by the softmax.
  """
  return dict(
      score=dict(name='linear', init_std='1/sqrt(D)'),
      select=dict(name='transport_to_experts', regularizer=regularizer, capacity_factor=capacity_factor,
                  strength=strength, iterations=iterations),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='dropless'))


@paper('Sparsity-Constrained Optimal Transport', '2209.15466', example=dict(capacity_factor=0.6), alone=dict(k=1))
def sparse_ot_tokens(k: int = 2, regularizer: Regularizer = 'sparse', capacity_factor: float = 1.05,
                     strength: float = 1., iterations: int = 20) -> dict[str, Any]:
  """Like `sparse_ot`, with at most k experts per token instead of at most C tokens per expert.

  `KSparseProjectionTransportTopExpertsPerItemRouter` of google-research/vmoe: the k largest entries of a token's row,
  placed under V-MoE's capacity by position, as with its `batch_priority=False`.
  """
  return dict(
      score=dict(name='linear', init_std='1/sqrt(D)'),
      select=dict(name='transport_to_tokens', k=k, regularizer=regularizer, strength=strength, iterations=iterations),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, convention='vmoe'))
