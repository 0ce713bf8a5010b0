"""DEMix: one expert per domain."""
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.config import ConfigError
from moejax.ranges import Count
from moejax.routing.papers import paper
from moejax.routing.stages import SCORES, Score, Scores, noiseless


@SCORES('task')
class Task(Score):
  """Expert j for task j; no parameters.

  Config:
    num_tasks: number of tasks in the data, at most the number of experts.
  """

  def __init__(self, *, dim: int | None, num_experts: int, num_tasks: Count):
    if dim is not None:
      raise ConfigError(": 'task' needs task ids. Set features=dict(name='tasks').")
    if num_tasks > num_experts:
      raise ConfigError(f'.num_tasks = {num_tasks} must be at most num_experts = {num_experts}.')
    self.num_experts = num_experts

  def __call__(self, features: Int[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <int32>[G,S] tasks. The logits are the log of a one-hot, with log 0 made finite."""
    one_hot = features[..., None] == jnp.arange(self.num_experts)
    return noiseless(jnp.where(one_hot, 0., jnp.finfo(jnp.float32).min))


@paper('DEMix Layers: Disentangling Domains for Modular Language Modeling', '2108.05036', chooses='fixed',
       exchangeable=False, example=dict(num_domains=3), alone=dict(num_domains=1))
def demix(num_domains: int) -> dict[str, Any]:
  """DEMix Layers (arXiv 2108.05036).

  Section 3: every feed-forward has one expert per domain, and all tokens of a document go to its domain's expert with
  weight one; routing is neither learned nor balanced. Training batches have equally many tokens of every domain
  (`data.balance='tasks'`). An expert's gradient is the mean over its own domain, E times its share of a mean over the
  batch: `optimizer.gradient_scale`. Section 4, mixtures of experts at test time: the evaluator 'domains'.
  """
  return dict(
      features=dict(name='tasks'),
      score=dict(name='task', num_tasks=num_domains),
      select=dict(name='top_k', k=1),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
