"""Dispatch to experts in segments: a token's n-th choice selects the expert that provides the n-th segment."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import ConfigError
from moejax.dispatch.dispatcher import DISPATCHERS, Dispatcher
from moejax.dispatch.rows import take_rows
from moejax.experts import BoundModule
from moejax.experts.layouts import Ragged, row_ids
from moejax.kernels import Name
from moejax.kernels.routes import by_expert
from moejax.routing.plans import TokenPlan


@DISPATCHERS('segments')
@dataclasses.dataclass(frozen=True)
class SegmentDispatch(Dispatcher):
  """For each of N choices, sorts tokens by expert, multiplies and restores the order: once for the hidden layer, whose
  segments are concatenated, and once for the output. On a mesh the compiler partitions it.

  Attributes:
    implementation: of the grouped matmul; None: by platform and shape.
  """
  implementation: Name | None = None

  @classmethod
  def supports(cls, plan_type, placed):
    """False: it cannot run other experts, so it is never suggested."""
    return False

  def check(self, plan):
    """Raises ConfigError unless `plan` is a dropless TokenPlan."""
    if not isinstance(plan, TokenPlan) or plan.capacity is not None:
      raise ConfigError(": dispatcher 'segments' requires token choice without a capacity. Use "
                        'papers.multi_hash, or another dispatcher.')

  def run(self, plan: TokenPlan, x: Float[Array, 'G S D'], experts: BoundModule) -> Float[Array, 'G S D']:
    """See `Dispatcher.run`. Output segments are weighted by their choices. Raises ConfigError for other experts."""
    module: Any = experts.experts
    choices = plan.expert.shape[-1]
    if getattr(module, 'segments', None) != choices:
      raise ConfigError(f": each token has {choices} choices: set experts=dict(name='segments', "
                        f'segments={choices}, ...), or another dispatch.')
    tokens = x.reshape(-1, x.shape[-1])
    expert = jnp.where(plan.kept, plan.expert, plan.num_experts).reshape(-1, choices)
    by_choice = [_SortedByExpert.of(expert[:, n], plan.num_experts, self.implementation) for n in range(choices)]
    hidden = jnp.concatenate([of_choice(tokens, lambda rows, layout: module.up(n, rows, layout))
                              for n, of_choice in enumerate(by_choice)], axis=-1)
    weight = plan.kept_weight.reshape(-1, choices)
    y = [weight[:, n, None] * of_choice(hidden, lambda rows, layout: module.down(n, rows, layout))
         for n, of_choice in enumerate(by_choice)]
    return jnp.concatenate(y, axis=-1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _SortedByExpert:
  # order <int32>[T] sorts tokens by expert, position is its inverse; tokens without an expert come last.
  order: jax.Array
  position: jax.Array
  layout: Ragged

  @classmethod
  def of(cls, expert, num_experts, implementation):
    order, position, sizes = by_expert(expert, num_experts)
    ids = row_ids(order, expert[order], num_experts)
    return cls(order, position, Ragged(expert[order], sizes, ids, implementation))

  def __call__(self, rows, compute):
    y = compute(take_rows(rows[None], self.order[None], self.position[None, :, None])[0], self.layout)
    y = jnp.where((self.layout.expert < self.layout.group_sizes.size)[:, None], y, 0)
    return take_rows(y[None], self.position[None], self.order[None, :, None])[0]
