"""DEMix: an expert for every domain."""
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.ranges import Count
from moejax.routing.papers import paper
from moejax.routing.scores import SCORES, Score, Scores, noiseless


@SCORES('task')
class Task(Score):
  """Expert j for task j; nothing to learn.

  Config:
    num_tasks: tasks of the data, at most as many as experts.
  """

  def __init__(self, *, where: str, dim: int | None, num_experts: int, num_tasks: Count):
    if dim is not None:
      raise ConfigError(f"{where}: 'task' looks at the ids of tasks. Set features=dict(name='tasks').")
    if num_tasks > num_experts:
      raise ConfigError(f'{where}.num_tasks: {num_tasks} tasks need as many experts, and num_experts is {num_experts}.')
    self.num_experts = num_experts

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <int32>[G,S] tasks. The logits are a finite stand-in for the log of a one-hot."""
    one_hot = features[..., None] == jnp.arange(self.num_experts)
    return noiseless(jnp.where(one_hot, 0., jnp.finfo(jnp.float32).min))


@paper('DEMix Layers: Disentangling Domains for Modular Language Modeling', '2108.05036', chooses='fixed',
       exchangeable=False, example=dict(num_domains=3), alone=dict(num_domains=1))
def demix(num_domains: int) -> dict[str, Any]:
  """DEMix Layers (arXiv 2108.05036).

  Section 3: every feed-forward is one expert a domain, and a document's tokens go to that of its domain, with weight
  one; nothing is learned about routing, nothing is balanced. Training: batches with equally many tokens of every domain
  (`data.balance='tasks'`). An expert's gradient is the mean over its own domain, which is E times its share in a mean
  over the batch: `optimizer.gradient_scale`. Section 4, mixtures of experts at test time: the evaluator 'domains'.
  """
  return dict(
      features=dict(name='tasks'),
      score=dict(name='task', num_tasks=num_domains),
      select=dict(name='top_k', k=1),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
