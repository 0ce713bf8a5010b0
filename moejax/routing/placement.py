"""Placement: how many slots an expert has in each group, and which choices get them.

Padding takes no slot.
"""
import dataclasses
import fractions
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, Registry
from moejax.ranges import Natural, Positive
from moejax.routing.by_expert import by_expert
from moejax.routing.plans import Leak, Plan, TokenPlan
from moejax.routing.scores import required

Convention = Literal['moejax', 'vmoe', 'flaxformer', 'mesh_tensorflow', 'deepspeed', 'fairseq', 'lingvo', 'tutel',
                     'fastmoe', 'fastmoe_switch', 'widenet']
Priority = Literal['position', 'batch', 'probability', 'random']
Order = Literal['choice', 'token']


def _up_to_multiple_of_4(slots: int) -> int:
  return slots + -slots % 4


# convention -> (slots for S tokens, E experts, K choices and a factor; minimum number of slots).
_CONVENTIONS: dict[str, tuple[Callable[[int, int, int, float], int], int]] = {
    # Exact: in floating point, 50 tokens with factor 1.1 and 5 experts would get 12 slots instead of 11.
    'moejax': (lambda s, e, k, f: math.ceil(fractions.Fraction(str(float(f))) * s * k / e), 0),
    'vmoe': (lambda s, e, k, f: _up_to_multiple_of_4(math.ceil(s * k * f / e)), 0),
    'flaxformer': (lambda s, e, k, f: round(f * s / e), 4),
    'mesh_tensorflow': (lambda s, e, k, f: min(s, int(s * f / e)), 4),
    # A product in float32, which rounds: 25 tokens with factor 1.2 and 2 experts get 16 slots instead of 15.
    'deepspeed': (lambda s, e, k, f: math.ceil(np.float32(s / e) * np.float32(f * k)), 4),
    'fairseq': (lambda s, e, k, f: int(k * f * math.ceil(s / e)), 0),
    'lingvo': (lambda s, e, k, f: _up_to_multiple_of_4(int(s * f / e)), 0),
    'tutel': (lambda s, e, k, f: k * int(f * math.ceil(s / e)), 0),
    'fastmoe': (lambda s, e, k, f: math.ceil(f * s) * k // e, 0),
    'fastmoe_switch': (lambda s, e, k, f: math.ceil(f * s / e), 0),
    'widenet': (lambda s, e, k, f: int(s * f * k // e) - 1, 0),
}


def capacity(tokens: int, num_experts: int, k: int, factor: float, convention: Convention = 'moejax',
             minimum: int | None = None) -> int:
  """Slots of an expert in a group, by a codebase's formula.

      moejax            ceil(factor*S*K/E)
      vmoe              ceil(S*K*factor/E), up to a multiple of 4
      flaxformer        max(round(factor*S/E), 4)                   ignores K
      mesh_tensorflow   max(min(S, int(S*factor/E)), 4)             ignores K
      deepspeed         max(ceil(S/E*(factor*K)), 4)                a product in float32
      fairseq           int(K*factor*ceil(S/E))
      lingvo            int(S*factor/E), up to a multiple of 4      ignores K
      tutel             K*int(factor*ceil(S/E))
      fastmoe           floor(ceil(factor*S)*K/E)                   its GShard gate
      fastmoe_switch    ceil(factor*S/E)                            its Switch gate, K = 1, in float64
      widenet           floor(S*K*factor/E) - 1                     as released

  Args:
    tokens: S.
    num_experts: E.
    k: K, experts per token.
    factor: capacity factor, a multiple of the equal share.
    convention: one of the above.
    minimum: replaces the formula's minimum of 4 or 0.
  """
  formula, least = _CONVENTIONS[convention]
  return max(formula(tokens, num_experts, k, factor), least if minimum is None else minimum)


def checked_slots(slots: int, tokens: int, factor: float, where: str) -> int:
  """min(`slots`, `tokens`): an expert cannot get more. `where`: config path of `factor`.

  Raises:
    ConfigError: there are no slots.
  """
  if slots < 1:
    raise ConfigError(f'{where} = {factor} drops every token: in a group of {tokens} tokens every expert gets {slots} '
                      'slots. Raise the factor, set a min_capacity, or make the groups larger.')
  return min(slots, tokens)


def slots_that_choose(tokens: int, num_experts: int, factor: float, where: str,
                      convention: Convention = 'moejax') -> int:
  """C for expert choice, with `factor` experts per token on average: `capacity` for K = 1, after `checked_slots`."""
  return checked_slots(capacity(tokens, num_experts, 1, factor, convention), tokens, factor, where)


def slots_in_order(expert: jax.Array, routed: jax.Array, num_experts: int, order: Order = 'choice') -> jax.Array:
  """The number of earlier choices of the same expert.

  Args:
    expert: <int32>[G,S,K].
    routed: <bool>[G,S,K]; other choices take no slot.
    num_experts: E.
    order: 'choice': all first choices, then all second ones, each in token order (GShard, V-MoE, flaxformer and
      their successors); 'token': all choices of a token before the next token, which is strictly causal.

  Returns:
    <int32>[G,S,K], undefined where not routed. Unique among the routed choices of an expert.
  """
  queue = (lambda array: array.swapaxes(1, 2)) if order == 'choice' else (lambda array: array)
  queued = queue(jnp.where(routed, expert, num_experts))
  slot = jax.vmap(lambda expert: _earlier(expert, num_experts))(queued.reshape(len(expert), -1))
  return queue(slot.reshape(queued.shape))


def _earlier(expert, num_experts):
  # A sort, because a cumsum over one-hots would need E times the memory.
  choices = by_expert(expert, num_experts)
  return choices.position - (jnp.cumsum(choices.sizes) - choices.sizes)[expert]


def _sorted_by(priority: jax.Array, place: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  # `place` of the rows of `arrays` sorted by descending priority (stable), returned in the original order.
  def take(array, rows):
    return jnp.take_along_axis(array, rows.reshape(rows.shape + (1,) * (array.ndim - 2)), axis=1)
  rows = jnp.argsort(-priority, axis=1, stable=True)
  return take(place(*(take(array, rows) for array in arrays)), jnp.argsort(rows, axis=1))


def slots_by_token_priority(expert: jax.Array, routed: jax.Array, num_experts: int, priority: jax.Array,
                            order: Order = 'choice') -> jax.Array:
  """`slots_in_order` after sorting tokens by `priority` <float32>[G,S], highest first.

  With a token's largest gate as priority this is Batch Prioritized Routing (V-MoE, section 4).
  """
  return _sorted_by(priority, lambda expert, routed: slots_in_order(expert, routed, num_experts, order), expert, routed)


def slots_by_choice_priority(expert: jax.Array, routed: jax.Array, num_experts: int, priority: jax.Array) -> jax.Array:
  """Slots in descending order of `priority` <float32>[G,S,K]: every expert keeps the choices of highest priority.

  With gates as priorities this is `switch_max` of Mesh TensorFlow, the policy 'probs' of DeepSpeed (since its commit
  853c938 of April 2026; see `papers.deepspeed`) and Megatron-LM's. First choices win ties.
  """
  def flat(array):
    return array.swapaxes(1, 2).reshape(len(array), -1, 1)
  groups, tokens, choices = expert.shape
  slot = _sorted_by(flat(priority)[..., 0], lambda expert, routed: slots_in_order(expert, routed, num_experts),
                    flat(expert), flat(routed))
  return slot.reshape(groups, choices, tokens).swapaxes(1, 2)


def check_choosing(k: int | None, where: str) -> None:
  """Raises ConfigError unless tokens choose a fixed number `k` of experts; `where`: config path of the placement."""
  if k is None:
    raise ConfigError(f'{where}: a capacity requires token choice with a fixed number of experts, which this selection '
                      "does not have. Use place=dict(name='dropless').")


class Placement:
  """Base class of placements.

  Attributes:
    soft: it returns a SoftPlan.
    by_document: it also takes `documents` <int32>[G,S].
  """
  soft: ClassVar[bool] = False
  by_document: ClassVar[bool] = False

  def leak(self, train: bool) -> Leak:
    """How the placement depends on later tokens."""
    raise NotImplementedError

  def __call__(self, plan: Plan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    """`plan` with only the entries that have a slot; `gates` has one value per entry of the plan."""
    raise NotImplementedError


PLACEMENTS = Registry('router placement', Placement, context=('num_experts', 'k'))


@PLACEMENTS('dropless')
@dataclasses.dataclass(frozen=True)
class Dropless(Placement):
  """No capacity: every selected choice is computed."""

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, plan: Plan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> Plan:
    return plan


@PLACEMENTS('capacity')
@dataclasses.dataclass(frozen=True)
class Capacity(Placement):
  """Every expert has C slots in every group; choices beyond C are dropped.

  All tokens of a group compete for its slots: documents packed into a row, and with `moe.group='batch'` the rows of a
  batch. Which tokens of a document are dropped, and so its output, depends on its neighbours. 'document_capacity' has
  slots per document.

  Config:
    capacity_factor: see the function `capacity`.
    eval_capacity_factor: the factor at evaluation; None: as in training. With convention 'fairseq' it is a fraction of
      the S tokens (0.25 in fairseq): C = ceil(fraction*S).
    convention: the formula for C.
    min_capacity: replaces the convention's minimum number of slots.
    priority: the order of choices: 'position'; 'batch': tokens with the largest gate (V-MoE); 'probability': choices
      with the largest gate (DeepSpeed for K > 2, `switch_max`); 'random': tokens in random order in training, by
      position at evaluation (DeepSpeed's random token selection).
    order: 'choice': first choices before second choices; 'token': token by token, strictly causal.
  """
  where: str
  num_experts: int
  k: int | None
  capacity_factor: Positive
  eval_capacity_factor: Positive | None = None
  convention: Convention = 'moejax'
  min_capacity: Natural | None = None
  priority: Priority = 'position'
  order: Order = 'choice'

  def __post_init__(self):
    check_choosing(self.k, self.where)

  def leak(self, train: bool) -> Leak:
    if self._priority(train) != 'position':
      return 'future'
    return 'slots' if self.order == 'choice' and self.k > 1 else 'causal'

  def slots(self, tokens: int, train: bool) -> int:
    """C for groups of `tokens`. Raises ConfigError if it is 0."""
    key = self._factor(train)
    return checked_slots(self.formula(tokens, train), tokens, getattr(self, key), f'{self.where}.{key}')

  def formula(self, tokens: int, train: bool) -> int:
    """The convention's formula for `tokens`, unchecked: it may be 0, or exceed `tokens`."""
    key = self._factor(train)
    if key == 'eval_capacity_factor' and self.convention == 'fairseq':
      return math.ceil(self.eval_capacity_factor * tokens)
    return capacity(tokens, self.num_experts, self.k, getattr(self, key), self.convention, self.min_capacity)

  def _factor(self, train):
    return 'capacity_factor' if train or self.eval_capacity_factor is None else 'eval_capacity_factor'

  def __call__(self, plan: TokenPlan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    slots = self.slots(plan.expert.shape[1], train)
    slot = self.queued(plan.expert, plan.kept, self.num_experts, gates, key, train)
    return dataclasses.replace(plan, kept=plan.kept & (slot < slots), slot=slot, capacity=slots)

  def queued(self, expert: jax.Array, routed: jax.Array, num_experts: int, gates: jax.Array, key: jax.Array | None,
             train: bool) -> jax.Array:
    """<int32>[G,S,K] the position of every choice in its expert's queue; see `slots_in_order`."""
    arguments = (expert, routed, num_experts)
    match self._priority(train):
      case 'position':
        return slots_in_order(*arguments, self.order)
      case 'batch':
        return slots_by_token_priority(*arguments, gates.max(-1), self.order)
      case 'random':
        draw = jax.random.uniform(required(key, 'place "capacity" with priority="random"'), expert.shape[:2])
        return slots_by_token_priority(*arguments, draw, self.order)
      case 'probability':
        return slots_by_choice_priority(*arguments, gates)

  def _priority(self, train: bool) -> Priority:
    return 'position' if self.priority == 'random' and not train else self.priority
