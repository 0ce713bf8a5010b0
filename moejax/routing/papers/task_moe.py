"""Task-level MoE: routing by task or sentence instead of token."""
from typing import Any, Literal

from moejax.routing.papers import paper


@paper('Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference', '2110.03742', chooses='fixed',
       example=dict(num_tasks=3), alone=None)
def task_moe(num_tasks: int, level: Literal['token', 'sentence', 'task'] = 'task',
             capacity_factor: float | None = None) -> dict[str, Any]:
  """Beyond Distillation: Task-level Mixture-of-Experts (arXiv 2110.03742).

  Section 3: two experts as in GShard; the router sees the token, the mean of the sentence's tokens, or a learned task
  embedding. With task routing all tokens of a task use the same two experts in a layer, which `surgery.extract_task`
  extracts. Best in the paper: token routing in the encoder and task routing in the decoder. Gates are renormalised over
  the two, and the second expert is always taken, as in lingvo's `Top2Gating`. Balance loss over tokens at every level,
  coefficient 0.01.
  `capacity_factor`: None: no capacity, as extraction requires; otherwise whole tasks overflow at once.
  """
  features = dict(name='task', num_tasks=num_tasks) if level == 'task' else dict(name=level)
  place = dict(name='dropless') if capacity_factor is None else dict(name='capacity', capacity_factor=capacity_factor)
  return dict(
      features=features,
      score=dict(name='linear', init_std=0.02),
      select=dict(name='gshard_top_2', second='all'),
      # Softmax over the two logits equals renormalised probabilities, and is bit-identical after extraction.
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=place,
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
