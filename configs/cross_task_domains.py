"""Cross-task skills on three domains of text: each domain learns its route through the layers, one expert in each.

System: CrossTaskMoE
Paper: Ye et al. 2022, "Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts" (arXiv
  2205.12701), section 4: three experts a layer, straight-through Gumbel-softmax over a learned vector of the task.
Data: as configs/dense_domains.py.
Command: python -m moejax.train --config=configs/cross_task_domains.py --workdir=runs/cross_task_domains
Cost: about four minutes on 2 CPU cores: all three experts see every byte, so that all have a gradient.
Result: Expected: routes that differ by domain in some layer, and a perplexity at or below configs/dense_domains.py.
Proof: numbers: tests/routing/test_task_routing.py::test_the_task_router_is_its_formula_in_float64,
  tests/routing/test_task_routing.py::test_at_a_high_temperature_routing_is_the_average_of_the_experts
Differs: the experts are feed-forwards, those of the paper whole layers of BART that start as copies of the pretrained one;
  evaluation takes the best expert, where the published code draws noise too. The temperature falls 20 times as fast as in
  the paper, for a run that is as much shorter.
"""
from configs import dense_domains
from moejax.routing import papers


def get_config():
  config = dense_domains.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=3, experts=dict(name='feed_forward', hidden=256, activation='gelu'),
      router=papers.cross_task(num_tasks=3, width=64, decay=6e-3), dispatch=dict(name='reference'), group='sequence')
  return config
