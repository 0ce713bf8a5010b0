"""Hierarchical gates of Mesh TensorFlow's layer `MoE2D`: up to two experts in one group, and one in another.

From `mesh_tensorflow/transformer/moe.py`; lucidrains/mixture-of-experts has a PyTorch port. The gates are those of
`hierarchical`, without noise.
"""
import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from moejax.ranges import NonNegative, Positive
from moejax.routing.balancing import BALANCERS, Balancer, Routed, switch_loss
from moejax.routing.hierarchical import Groups, two_levels
from moejax.routing.placement import PLACEMENTS, Placement, capacity, check_choosing, checked_slots, slots_in_order
from moejax.routing.plans import Leak, TokenPlan, token_plan
from moejax.routing.scores import Scores, required
from moejax.routing.selection import SELECTIONS, top_k

SecondChoice = Literal['all', 'random']


@SELECTIONS('hierarchical_top_2')
@dataclasses.dataclass(frozen=True)
class HierarchicalTop2:
  """Two groups per token: two experts of the first and one of the second, in this order; at most three (`MoE2D`).

  Config:
    groups: N.
    second: 'all', or 'random': the second group, and the second expert of the first, with probability
      min(1, g2 / threshold), where g2 = p2 / (p1 + p2) at their level.
    eval_second: the same at evaluation, with the same draws in every call.
    threshold: for 'random'.
  """
  where: str
  num_experts: int
  groups: Groups
  second: SecondChoice = 'random'
  eval_second: SecondChoice = 'random'
  threshold: NonNegative = 0.2

  reads_slots: ClassVar[bool] = False

  @property
  def k(self) -> int:
    """K: 3, fewer with only one group, or one expert per group."""
    return 1 + (self.groups > 1) + (self.num_experts > self.groups)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    outer, inner = two_levels(scores.select, self.groups)
    size = inner.shape[-1]
    policy = self.second if train else self.eval_second
    if policy == 'random':
      key = required(key, "select 'hierarchical_top_2' with second='random'") if train else jax.random.key(0)

    def best(logits, name):
      # ([..., 2] the best two, whether the second is taken); a level of size one has no second.
      two = top_k(logits, min(2, logits.shape[-1]))
      if policy == 'all' or two.shape[-1] < 2:
        return two, jnp.ones(valid.shape, bool)
      share = jax.nn.softmax(jnp.take_along_axis(logits, two, axis=-1), axis=-1)[..., 1]
      return two, jax.random.uniform(jax.random.fold_in(key, name), valid.shape) * self.threshold < share

    group, second_group = best(outer, 0)
    of_group = lambda i: jnp.take_along_axis(inner, group[..., i, None, None], axis=-2)[..., 0, :]
    inside, second_inside = best(of_group(0), 1)
    expert, routed = [inside[..., 0] + size * group[..., 0]], [valid]
    if size > 1:
      expert, routed = [*expert, inside[..., 1] + size * group[..., 0]], [*routed, valid & second_inside]
    if self.groups > 1:
      expert = [*expert, jnp.argmax(of_group(1), axis=-1) + size * group[..., 1]]
      routed = [*routed, valid & second_group]
    return token_plan(jnp.stack(expert, axis=-1), jnp.stack(routed, axis=-1), self.num_experts)


@PLACEMENTS('two_level_capacity')
@dataclasses.dataclass(frozen=True)
class TwoLevelCapacity(Placement):
  """Capacities of groups, and of the experts within a group among the tokens that have a slot of it (`MoE2D`).

  A group has T = max(min(S, int(S * factor / N)), 4) slots, which first choices take first; each of its experts has
  max(min(T, int(T * factor / M)), 4), with a capacity factor of its own.

  Config:
    groups: N.
    capacity_factor, eval_capacity_factor: for groups.
    second_level_factor: for the experts of a group.
  """
  where: str
  num_experts: int
  k: int | None
  groups: Groups
  capacity_factor: Positive = 1.25
  eval_capacity_factor: Positive = 2.
  second_level_factor: Positive = 1.

  def __post_init__(self):
    check_choosing(self.k, self.where)

  def leak(self, train: bool) -> Leak:
    return 'slots'

  def slots(self, tokens: int, train: bool) -> tuple[int, int]:
    """(slots of a group of experts, slots of an expert) for routing groups of `tokens`."""
    name = 'capacity_factor' if train else 'eval_capacity_factor'
    factor, second = getattr(self, name), self.second_level_factor
    of_group = checked_slots(capacity(tokens, self.groups, 2, factor, 'mesh_tensorflow'), tokens, factor,
                             f'{self.where}.{name}')
    size = self.num_experts // self.groups
    of_expert = capacity(of_group, size, 2, second, 'mesh_tensorflow')
    return of_group, checked_slots(of_expert, of_group, second, f'{self.where}.second_level_factor')

  def __call__(self, plan: TokenPlan, gates: jax.Array, *, key: jax.Array | None, train: bool) -> TokenPlan:
    of_group, of_expert = self.slots(plan.expert.shape[1], train)
    group = plan.expert // (self.num_experts // self.groups)
    # The first choice represents its group, and the last choice the other group, if any.
    ends = jnp.stack([group[..., 0], group[..., -1]], axis=-1)
    apart = jnp.stack([plan.kept[..., 0], plan.kept[..., -1] & (ends[..., 0] != ends[..., 1])], axis=-1)
    has_slot = apart & (slots_in_order(ends, apart, self.groups) < of_group)
    kept = plan.kept & jnp.where(group == ends[..., :1], has_slot[..., :1], has_slot[..., 1:])
    # A group's slots hold first choices, then second ones, each in token order, as do the choices of a plan.
    slot = slots_in_order(plan.expert, kept, self.num_experts)
    return dataclasses.replace(plan, kept=kept & (slot < of_expert), slot=slot, capacity=of_expert)


@BALANCERS('hierarchical_switch')
class HierarchicalSwitch(Balancer):
  """The balance loss over groups, plus the mean of the balance losses within groups (`MoE2D`): 2 at uniform routing.

  A group's loss is over the tokens whose first choice is the group. The published code averages over all slots of the
  group, including empty ones and other tokens' slots, which makes it smaller.
  """

  reads = ('outer', 'inner')

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    outer, inner = routed.scores.extras['outer'], routed.scores.extras['inner']
    first = outer.argmax(-1)
    over_groups = _first_choices_loss(outer, routed.valid)
    of_groups = jax.vmap(lambda i, logits: _first_choices_loss(logits, routed.valid & (first == i)), in_axes=(0, 2))
    return over_groups + of_groups(jnp.arange(outer.shape[-1]), inner).mean()


def _first_choices_loss(logits, valid):
  return switch_loss(jax.nn.softmax(logits, axis=-1), top_k(logits, 1), valid[..., None], valid, 'gshard')
