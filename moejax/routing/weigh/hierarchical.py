"""Weights of two levels of gates; see `score.hierarchical`."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from moejax.config import ConfigError
from moejax.routing.plans import TokenPlan
from moejax.routing.score.hierarchical import Groups, two_levels
from moejax.routing.stages import WEIGHTINGS, Weighting


def hierarchical_weights(expert: Int[Array, 'G S K'], logits: Float32[Array, 'G S E'],
                         groups: int) -> Float32[Array, 'G S K']:
  """`G_i * G_ij`: softmax over the chosen groups, times softmax over the chosen experts of the group (equation 12).

  Args:
    expert: <int32>[G,S,K], all different.
    logits: <float32>[G,S,E], see `joint_logits`.
    groups: N.

  Returns:
    <float32>[G,S,K] summing to 1 over K.
  """
  outer, _ = two_levels(logits, groups)
  group = expert // (logits.shape[-1] // groups)
  def pick(values, index):
    return jnp.sum(jnp.where(index[..., None] == jnp.arange(values.shape[-1]), values[:, :, None], 0), axis=-1)
  same = group[..., :, None] == group[..., None, :]
  of_expert = jax.nn.softmax(pick(logits, expert)[..., None, :], axis=-1, where=same)
  # A group occurs once per choice in it, but counts once.
  of_group = jax.nn.softmax(pick(outer, group) - jnp.log(same.sum(-1)), axis=-1) * same.sum(-1)
  return of_group * jnp.diagonal(of_expert, axis1=-2, axis2=-1)


@WEIGHTINGS('hierarchical')
@dataclasses.dataclass(frozen=True)
class HierarchicalWeights(Weighting):
  """See `hierarchical_weights`; the share of choices not sampled or dropped is lost.

  Config:
    groups: N, a divisor of the number of experts, as in the score.
  """
  k: int | None
  num_experts: int
  groups: Groups

  def __post_init__(self):
    if self.k is None:
      raise ConfigError(": weigh 'hierarchical' requires token choice, but this selection is not token "
                        "choice. Use weigh=dict(name='softmax').")

  def weigh(self, plan: TokenPlan, logits: Float32[Array, 'G S *E']) -> TokenPlan:
    return plan.scale(hierarchical_weights(plan.expert, logits, self.groups))

  @property
  def always_one(self) -> bool:
    return self.k == 1
