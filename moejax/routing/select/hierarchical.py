"""Groups of experts, then experts in these groups; see `score.hierarchical`.

`HierarchicalTopK` is Shazeer et al. 2017, appendix B; `HierarchicalTop2` the layer `MoE2D` of Mesh TensorFlow
(`mesh_tensorflow/transformer/moe.py`; lucidrains/mixture-of-experts has a PyTorch port).
"""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.config import ConfigError
from moejax.ranges import Count, NonNegative
from moejax.routing.plans import Leak, TokenPlan, token_plan
from moejax.routing.score.hierarchical import Groups, two_levels
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import SELECTIONS, Scores, Selection, required


@SELECTIONS('hierarchical_top_k')
@dataclasses.dataclass(frozen=True)
class HierarchicalTopK(Selection):
  """Each token chooses its best `groups_per_token` groups, and the best `per_group` experts in each.

  Config:
    groups: N, a divisor of the number of experts.
    groups_per_token: number of groups a token chooses.
    per_group: number of experts it chooses in each.
  """
  num_experts: int
  groups: Groups
  groups_per_token: Count
  per_group: Count

  def __post_init__(self):
    size = self.num_experts // self.groups
    for name, most in (('groups_per_token', self.groups), ('per_group', size)):
      if getattr(self, name) > most:
        raise ConfigError(f'.{name} must be between 1 and {most}, for {self.groups} groups of {size} '
                          f'experts; not {getattr(self, name)}.')

  @property
  def k(self) -> int:
    """K."""
    return self.groups_per_token * self.per_group

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> TokenPlan:
    outer, inner = two_levels(scores.select, self.groups)
    group = top_k(outer, self.groups_per_token)
    expert = jnp.take_along_axis(top_k(inner, self.per_group), group[..., None], axis=-2)
    expert = (expert + inner.shape[-1] * group[..., None]).reshape(*valid.shape, -1)
    return token_plan(expert, valid[..., None], self.num_experts)


SecondChoice = Literal['all', 'random']


@SELECTIONS('hierarchical_top_2')
@dataclasses.dataclass(frozen=True)
class HierarchicalTop2(Selection):
  """Two groups per token: two experts of the first and one of the second, in this order; at most three (`MoE2D`).

  Config:
    groups: N.
    second: 'all', or 'random': the second group, and the second expert of the first, with probability
      min(1, g2 / threshold), where g2 = p2 / (p1 + p2) at their level.
    eval_second: the same at evaluation, with the same draws in every call.
    threshold: for 'random'.
  """
  num_experts: int
  groups: Groups
  second: SecondChoice = 'random'
  eval_second: SecondChoice = 'random'
  threshold: NonNegative = 0.2

  @property
  def k(self) -> int:
    """K: 3, fewer with only one group, or one expert per group."""
    return 1 + (self.groups > 1) + (self.num_experts > self.groups)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> TokenPlan:
    outer, inner = two_levels(scores.select, self.groups)
    size = inner.shape[-1]
    policy = self.second if train else self.eval_second
    key = key if train else jax.random.key(0)

    def best(logits, name):
      # ([..., 2] the best two, whether the second is taken); a level of size one has no second.
      two = top_k(logits, min(2, logits.shape[-1]))
      if policy == 'all' or two.shape[-1] < 2:
        return two, jnp.ones(valid.shape, bool)
      share = jax.nn.softmax(jnp.take_along_axis(logits, two, axis=-1), axis=-1)[..., 1]
      level_key = jax.random.fold_in(required(key, "select 'hierarchical_top_2' with second='random'"), name)
      return two, jax.random.uniform(level_key, valid.shape) * self.threshold < share

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
