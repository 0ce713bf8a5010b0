"""Task-level MoE on three domains of text: two of eight experts for each domain in each layer.

System: Task-level MoE
Paper: Kudugunta et al. 2021, "Beyond Distillation" (arXiv 2110.03742), section 3: routing by task; a dense model of one
  task's experts is extracted with `moejax.surgery.extract_task`.
Data: as for configs/dense_domains.py, with the same active compute.
Command: python -m moejax.train --config=configs/task_moe_domains.py --workdir=runs/task_moe_domains
Cost: about three minutes on 2 CPU cores.
Result: Expected: a perplexity near that of configs/dense_domains.py, at the cost of a dense model once a task is
  extracted. For models half as wide, after 200 steps: 11.7 by task, 11.4 by token, 11.5 dense.
Proof: identities: tests/surgery/test_extract_task.py::test_the_extracted_model_is_the_full_one_for_its_task,
  tests/routing/features/test_task.py::test_the_mean_of_a_sentence_equals_a_loop_over_its_tokens
Differs: nothing known. Here without a capacity (for extraction, nothing may be dropped), and the task is a domain, not
  a language pair.
"""
from configs import dense_domains
from moejax.routing import papers


def get_config():
  config = dense_domains.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=128, activation='gelu'),
      router=papers.task_moe(num_tasks=3), dispatch=dict(name='grouped'), group='sequence')
  return config
