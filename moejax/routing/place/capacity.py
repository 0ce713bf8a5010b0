"""A fixed number of slots for every expert."""
import dataclasses
import math
from typing import Literal

import jax
from jaxtyping import Array, Bool, Float32, Int

from moejax.config import ConfigError
from moejax.ranges import Natural, Positive
from moejax.routing.place.conventions import Convention, capacity, checked_slots
from moejax.routing.place.queues import Order, slots_by_choice_priority, slots_by_token_priority, slots_in_order
from moejax.routing.plans import Leak, TokenPlan
from moejax.routing.stages import PLACEMENTS, Placement, required

Priority = Literal['position', 'batch', 'probability', 'random']


def check_choosing(k: int | None) -> int:
  """Returns `k`; raises ConfigError unless tokens choose a fixed number `k` of experts."""
  if k is None:
    raise ConfigError(': a capacity requires token choice with a fixed number of experts, which this selection '
                      "does not have. Use place=dict(name='dropless').")
  return k


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
  num_experts: int
  k: int | None
  capacity_factor: Positive
  eval_capacity_factor: Positive | None = None
  convention: Convention = 'moejax'
  min_capacity: Natural | None = None
  priority: Priority = 'position'
  order: Order = 'choice'

  def __post_init__(self):
    check_choosing(self.k)

  def leak(self, train: bool) -> Leak:
    if self._priority(train) != 'position':
      return 'future'
    return 'slots' if self.order == 'choice' and check_choosing(self.k) > 1 else 'causal'

  def slots(self, tokens: int, train: bool) -> int:
    """C for groups of `tokens`. Raises ConfigError if it is 0."""
    key = self._factor(train)
    return checked_slots(self.formula(tokens, train), tokens, getattr(self, key), key)

  def formula(self, tokens: int, train: bool) -> int:
    """The convention's formula for `tokens`, unchecked: it may be 0, or exceed `tokens`."""
    key = self._factor(train)
    if key == 'eval_capacity_factor' and self.convention == 'fairseq':
      return math.ceil(getattr(self, key) * tokens)
    return capacity(tokens, self.num_experts, check_choosing(self.k), getattr(self, key), self.convention,
                    self.min_capacity)

  def _factor(self, train):
    return 'capacity_factor' if train or self.eval_capacity_factor is None else 'eval_capacity_factor'

  def __call__(self, plan: TokenPlan, gates: Float32[Array, 'G S K'], *, key: jax.Array | None,
               train: bool) -> TokenPlan:
    slots = self.slots(plan.expert.shape[1], train)
    slot = self.queued(plan.expert, plan.kept, self.num_experts, gates, key, train)
    return dataclasses.replace(plan, kept=plan.kept & (slot < slots), slot=slot, capacity=slots)

  def queued(self, expert: Int[Array, 'G S K'], routed: Bool[Array, 'G S K'], num_experts: int,
             gates: Float32[Array, 'G S K'], key: jax.Array | None, train: bool) -> Int[Array, 'G S K']:
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


@dataclasses.dataclass(frozen=True)
class CapacityInOrder(Capacity):
  """Base class of placements whose slots are assigned by position and choice only."""

  def __post_init__(self):
    super().__post_init__()
    if (self.priority, self.order) != ('position', 'choice'):
      raise ConfigError(': this placement assigns slots by position and choice. Remove priority and '
                        "order, or use name='capacity'.")
