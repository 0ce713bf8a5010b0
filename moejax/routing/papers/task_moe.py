"""Task-level MoE: routes by tasks or sentences instead of tokens."""
from typing import Any, Literal

from moejax.routing.papers import paper


@paper('Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference', '2110.03742', chooses='fixed',
       example=dict(num_tasks=3), alone=None)
def task_moe(num_tasks: int, level: Literal['token', 'sentence', 'task'] = 'task',
             capacity_factor: float | None = None) -> dict[str, Any]:
  """Beyond Distillation: Task-level Mixture-of-Experts (arXiv 2110.03742).

  Section 3: two experts as in GShard, whose router sees the token, the mean of the sentence's tokens, or a learned
  vector of the task; by task, all its tokens have the same two experts in a layer, which `surgery.extract_task` takes
  out. Best in the paper: tokens in the encoder and tasks in the decoder. Gates are renormalised over the two, and the
  second expert is always taken, as in lingvo's `Top2Gating`. Balance loss over tokens, coefficient 0.01, whatever
  routes them.
  `capacity_factor`: None is without a capacity, as extraction needs it: whole tasks overflow at once.
  """
  features = dict(name='task', num_tasks=num_tasks) if level == 'task' else dict(name=level)
  place = dict(name='dropless') if capacity_factor is None else dict(name='capacity', capacity_factor=capacity_factor)
  return dict(
      features=features,
      score=dict(name='linear', init_std=0.02),
      select=dict(name='top_2', second='all'),
      # Softmax over the two logits: the probabilities renormalised, to the last bit the same with experts left out.
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=place,
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
