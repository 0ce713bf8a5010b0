"""Sparsity-constrained optimal transport on handwritten digits, at the active compute of configs/vit_digits.py.

System: Sparsity-constrained OT
Paper: Liu, Puigcerver and Blondel 2022, "Sparsity-Constrained Optimal Transport" (arXiv 2209.15466), section 6. Experts
  take at most an equal share of the patches, by their column of a transport plan.
Command: python -m moejax.train --config=configs/sparse_ot_digits.py --workdir=runs/sparse_ot_digits
Cost: about two minutes on 2 CPU cores.
Expected: the accuracy of configs/expert_choice_digits.py, within a percent or two.
Proof: implementation: tests/oracles/test_jaxopt_transport.py::test_plans_are_those_of_jaxopt,
  tests/routing/select/test_optimal_transport.py::test_without_a_limit_sparse_transport_is_the_quadratic_program
Differs: patches with zero in an expert's column are not selected; google-research/vmoe fills the expert's free slots
  with such patches, and weighs them by the softmax like the others.
"""
from configs import expert_choice_digits
from moejax.routing import papers


def get_config():
  config = expert_choice_digits.get_config()
  config.model.moe.router = papers.sparse_ot(capacity_factor=1.)
  config.model.moe.experts.hidden = 256
  return config
