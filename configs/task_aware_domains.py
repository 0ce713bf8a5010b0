"""Task-aware gates on three domains of text: the router of a byte sees its domain too.

System: Task-aware MoE
Paper: Gupta et al. 2022, "Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners" (arXiv 2204.07689).
Data: as for configs/dense_domains.py, with the same active compute.
Command: python -m moejax.train --config=configs/task_aware_domains.py --workdir=runs/task_aware_domains
Cost: about three minutes on 2 CPU cores.
Result: Expected: at or below the perplexity of configs/task_moe_domains.py, near that of routing by token.
Proof: numbers: tests/routing/features/test_task.py::test_a_gate_that_is_aware_of_the_task_sees_token_and_task,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[task_aware]
Differs: no code is published; concatenating the token and a task embedding, two experts per token and the balance loss
  are choices of this config.
"""
from configs import task_moe_domains
from moejax.routing import papers


def get_config():
  config = task_moe_domains.get_config()
  config.model.moe.router = papers.task_aware(num_tasks=3)
  return config
