"""The k best experts within the best groups of experts (DeepSeek-V2 and V3)."""
import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config import ConfigError
from moejax.ranges import Count, Divides
from moejax.routing.plans import Plan
from moejax.routing.select.top_k import TopK, top_k
from moejax.routing.stages import SELECTIONS, Scores

GroupScore = Literal['max', 'top_2_sum']


def group_limited(scores: Float[Array, '... E'], groups: int, kept: int,
                  group_score: GroupScore) -> Float[Array, '... E']:
  """`scores` with -inf where an expert is not in one of the token's `kept` best groups of experts.

  Args:
    scores: <float>[..., E]; gates for 'top_2_sum', because sums of logits are meaningless.
    groups: number of groups of consecutive experts.
    kept: groups per token.
    group_score: a group's best score (DeepSeek-V2, section 2.2.2), or the sum of its best two (as in the published code
      of DeepSeek-V3, where gates are sigmoids, and in Megatron-LM).

  Returns:
    <float>[..., E].
  """
  by_group = scores.reshape(*scores.shape[:-1], groups, -1)
  best = by_group.max(-1)
  if group_score == 'top_2_sum':
    others = jnp.where(jnp.arange(by_group.shape[-1]) == by_group.argmax(-1)[..., None], -jnp.inf, by_group)
    best = best + others.max(-1)
  allowed = (top_k(best, kept)[..., None] == jnp.arange(groups)).any(-2)
  return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(scores.shape)


@SELECTIONS('group_limited')
@dataclasses.dataclass(frozen=True)
class GroupLimited(TopK):
  """The `k` best experts within the token's best groups: see the function `group_limited`.

  With as many groups as the mesh axis `expert` has devices, each device holds one group, and `groups_per_token` bounds
  the number of devices a token is sent to.

  Config besides `k`:
    groups: a divisor of the number of experts.
    groups_per_token: at most `groups`; they must contain at least `k` experts.
    group_score: 'max', or 'top_2_sum' of the gates (plus the bias of `balance.bias`, if any); experts are then ranked
      by the gates too.
  """
  groups: Annotated[Count, Divides('num_experts')]
  groups_per_token: Count
  group_score: GroupScore = 'max'

  @property
  def reads_gates(self) -> bool:
    return self.group_score == 'top_2_sum'

  def __post_init__(self):
    super().__post_init__()
    size = self.num_experts // self.groups
    least = -(-self.k // size)
    if not least <= self.groups_per_token <= self.groups:
      raise ConfigError(f'.groups_per_token must be between {least} (for k = {self.k} experts in groups of '
                        f'{size}) and {self.groups}, the number of groups; not {self.groups_per_token}.')
    if self.group_score == 'top_2_sum' and size < 2:
      raise ConfigError(".group_score: 'top_2_sum' needs groups of at least two experts. Use 'max'.")

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    limited = group_limited(scores.select, self.groups, self.groups_per_token, self.group_score)
    return super().__call__(dataclasses.replace(scores, select=limited), valid, key=key, train=train)
