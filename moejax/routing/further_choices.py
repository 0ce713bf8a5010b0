"""Choices after the first: second experts kept by a policy, and fallback experts.

    select 'top_n'    further experts kept by a policy with a threshold per rank (Mesh TensorFlow, st-moe-pytorch)
    select 'ranked'   one expert, and the next best as fallbacks if it is full
    place 'retry'     falls back on the next best if the expert is full (no-token-left-behind; Switch, section 6)
    place 'straight_through'  a capacity whose dispatch has a gradient too (st-moe-pytorch)
"""
import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.ranges import Natural, NonNegative
from moejax.routing.placement import PLACEMENTS, Capacity, slots_in_order
from moejax.routing.plans import Leak, Plan, SoftPlan, TokenPlan, token_plan
from moejax.routing.scores import Scores, required
from moejax.routing.selection import SELECTIONS, TopK, top_k
from moejax.routing.shares import normalized

Policy = Literal['all', 'none', 'threshold', 'random']
PolicyGate = Literal['renormalized', 'probability']


def further_choices(gates: jax.Array, policy: Policy, thresholds: tuple[float, ...],
                    key: jax.Array | None) -> jax.Array:
  """The choices of a token that are kept; the first always is (Mesh TensorFlow; st-moe-pytorch for more than two).

  Args:
    gates: <float32>[G,S,K] of the chosen experts, best first.
    policy: for the choices after the first: 'all'; 'none'; 'threshold': gates above their threshold; 'random': with
      probability min(1, gate / threshold).
    thresholds: K - 1 floats, from the second choice on.
    key: for 'random'.

  Returns:
    <bool>[G,S,K].
  """
  first, further = jnp.ones(gates[..., :1].shape, bool), gates[..., 1:]
  least = jnp.asarray(thresholds, jnp.float32)
  match policy:
    case 'all':
      counts = jnp.ones(further.shape, bool)
    case 'none':
      counts = jnp.zeros(further.shape, bool)
    case 'threshold':
      counts = further > least
    case 'random':
      counts = jax.random.uniform(key, further.shape) * least < further
  return jnp.concatenate([first, counts], axis=-1)


@SELECTIONS('top_n')
@dataclasses.dataclass(frozen=True)
class TopN(TopK):
  """The `k` best experts, with those after the first kept by a policy: see `further_choices`.

  Config besides `k`:
    policy, eval_policy: in training and at evaluation; evaluation draws the same numbers in every call.
    threshold: one for all choices after the first, or one for each of the k - 1.
    gate: compared with the threshold: probabilities 'renormalized' over the k, or unchanged ('probability': fairseq).
  """
  policy: Policy = 'random'
  eval_policy: Policy = 'random'
  threshold: NonNegative | tuple[NonNegative, ...] = 0.2
  gate: PolicyGate = 'renormalized'

  def __post_init__(self):
    super().__post_init__()
    if len(self._thresholds()) != self.k - 1:
      raise ConfigError(f'{self.where}.threshold has {len(self._thresholds())} values for {self.k - 1} choices after '
                        'the first: give one for each, or a single float.')

  def _thresholds(self) -> tuple[float, ...]:
    return (self.threshold,) * (self.k - 1) if isinstance(self.threshold, (int, float)) else tuple(self.threshold)

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    policy = self.policy if train else self.eval_policy
    if policy == 'random':
      key = required(key, 'select "top_n" with policy="random"') if train else jax.random.key(0)
    plan = super().__call__(scores, valid, key=key, train=train)
    gates = plan.pick(jax.nn.softmax(scores.logits, axis=-1))
    gates = normalized(gates) if self.gate == 'renormalized' else gates
    counts = further_choices(jax.lax.stop_gradient(gates), policy, self._thresholds(), key)
    return dataclasses.replace(plan, kept=plan.kept & counts)


@SELECTIONS('ranked')
@dataclasses.dataclass(frozen=True)
class Ranked:
  """The best expert of each token, and the next best `alternatives` as fallbacks for place 'retry'.

  Config:
    alternatives: number of fallback experts.
  """
  where: str
  num_experts: int
  alternatives: Natural = 3

  k: ClassVar[int] = 1
  reads_slots: ClassVar[bool] = False

  def __post_init__(self):
    if self.alternatives >= self.num_experts:
      raise ConfigError(f'{self.where}.alternatives must be between 0 and {self.num_experts - 1}, the number of other '
                        f'experts; not {self.alternatives}.')

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    expert = top_k(scores.select, 1 + self.alternatives)
    kept = valid[..., None] & (jnp.arange(expert.shape[-1]) == 0)
    return token_plan(expert, kept, self.num_experts)


def slots_with_retries(expert: jax.Array, routed: jax.Array, num_experts: int,
                       capacity: int) -> tuple[jax.Array, jax.Array]:
  """Assigns slots in rounds: in each, tokens still without a slot try their next expert, in order of position.

  Args:
    expert: <int32>[G,S,K], best first.
    routed: <bool>[G,S]; other tokens take no slot.
    num_experts: E.
    capacity: C.

  Returns:
    kept <bool>[G,S,K], at most one choice per token, and slot <int32>[G,S,K] of the kept choices.
  """
  taken = jnp.zeros((len(expert), num_experts), jnp.int32)
  waiting, kept, slots = routed, [], []
  for choice in jnp.moveaxis(expert, -1, 0):
    names = choice[..., None] == jnp.arange(num_experts)
    slot = slots_in_order(choice[..., None], waiting[..., None], num_experts)[..., 0]
    slot += jnp.sum(jnp.where(names, taken[:, None], 0), axis=-1)
    fits = waiting & (slot < capacity)
    taken += jnp.sum(names & fits[..., None], axis=1)
    waiting &= ~fits
    kept.append(fits)
    slots.append(slot)
  return jnp.stack(kept, axis=-1), jnp.stack(slots, axis=-1)


@dataclasses.dataclass(frozen=True)
class _InOrder(Capacity):
  # A capacity whose slots are assigned by position only.

  def __post_init__(self):
    super().__post_init__()
    if (self.priority, self.order) != ('position', 'choice'):
      raise ConfigError(f'{self.where}: this placement assigns slots by position and choice. Remove priority and '
                        "order, or use name='capacity'.")


@PLACEMENTS('retry')
@dataclasses.dataclass(frozen=True)
class Retry(_InOrder):
  """A capacity where tokens of a full expert fall back on the next best; see `slots_with_retries`, `Ranked`.

  Config: capacity_factor, eval_capacity_factor, convention and min_capacity of 'capacity'.
  """

  def leak(self, train: bool) -> Leak:
    return 'slots'

  def __call__(self, plan: TokenPlan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    slots = self.slots(plan.expert.shape[1], train)
    kept, slot = slots_with_retries(plan.expert, plan.kept[..., 0], self.num_experts, slots)
    return dataclasses.replace(plan, kept=kept, slot=slot, capacity=slots)


@PLACEMENTS('straight_through')
@dataclasses.dataclass(frozen=True)
class StraightThrough(_InOrder):
  """A capacity whose dispatch is 1 in value and the combine weight in gradient: `1 + w - stop_gradient(w)`.

  The router thus also learns from the derivative of an expert's output by its input. Makes a SoftPlan (dispatch
  'einsum').

  Config: capacity_factor, eval_capacity_factor, convention and min_capacity of 'capacity'.
  """
  soft: ClassVar[bool] = True

  def __call__(self, plan: TokenPlan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> SoftPlan:
    soft = super().__call__(plan, gates, key=key, train=train).to_slots().to_soft()
    return dataclasses.replace(soft, dispatch=soft.dispatch + soft.combine - jax.lax.stop_gradient(soft.combine))
