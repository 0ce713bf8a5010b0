"""Cross-task skills on three domains of text: each domain learns its route, one of three layers at every depth.

System: CrossTaskMoE
Paper: Ye et al. 2022, "Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts" (arXiv
  2205.12701), section 4: every expert is a whole layer, three at each depth; straight-through Gumbel-softmax
  over a learned task embedding.
Data: as for configs/dense_domains.py, which is also the model of one domain's route.
Command: python -m moejax.train --config=configs/cross_task_domains.py --workdir=runs/cross_task_domains
Cost: about six minutes on 2 CPU cores: all three layers compute every byte, so that all routes have a gradient. A
  domain's route, extracted with `moejax.surgery.extract_task`, costs as much as the dense model.
Result: Expected: routes that differ by domain in some layer, and a perplexity at or below configs/dense_domains.py.
Proof: numbers: tests/routing/papers/test_cross_task.py::test_the_task_router_is_its_formula_in_float64,
  tests/layers/test_block_mixture.py::test_the_output_is_the_weighted_sum_of_a_loop_over_layers,
  tests/layers/test_block_mixture.py::test_gradients_of_a_hard_route_are_straight_through,
  tests/layers/test_block_mixture.py::test_a_route_is_the_dense_model_of_its_layers
Differs: layers are initialised independently, in the paper as copies of a pretrained BART's; here the model is a
  decoder. Evaluation takes the best layer, whereas the published code adds noise there too. The temperature falls 20
  times as fast as in the paper, because the run is that much shorter.
"""
from configs import dense_domains
from moejax.routing import papers


def get_config():
  config = dense_domains.get_config()
  config.model.update(sparse=dict(name='every', n=1), sparse_form='layer')
  config.model.moe = dict(num_experts=3, router=papers.cross_task(num_tasks=3, width=64, decay=6e-3))
  return config
