"""Task-aware gates: the router sees the token and its task."""
from typing import Any

from moejax.routing.papers import paper


@paper('Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners', '2204.07689',
       example=dict(num_tasks=3), alone=dict(num_tasks=3, k=1))
def task_aware(num_tasks: int, k: int = 2, task_width: int | None = None) -> dict[str, Any]:
  """Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners (arXiv 2204.07689).

  Gates are conditioned on the task, over experts shared by all tasks: the router sees the token and a learned task
  embedding, so that related tasks can share routes and unrelated ones separate. The abstract specifies no more; here
  k = 2, gates renormalised, balance loss 0.01, and no capacity.
  """
  return dict(
      features=dict(name='token_and_task', num_tasks=num_tasks, width=task_width),
      score=dict(name='linear', init_std=0.02),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
