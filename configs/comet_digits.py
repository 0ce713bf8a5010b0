"""COMET with local search on handwritten digits: two trees over eight experts for each patch.

System: COMET
Paper: Ibrahim et al. 2023, "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search"
  (arXiv 2306.02824), replacing V-MoE's gate in configs/vmoe_digits.py; the search takes the first 100 steps.
Command: python -m moejax.train --config=configs/comet_digits.py --workdir=runs/comet_digits
Cost: about three minutes on 2 CPU cores.
Result: Expected: the accuracy of V-MoE within a point, and an entropy of weights that falls from log 8.
Proof: identities: tests/routing/score/test_smooth_step.py::test_codes_and_trees_equal_loops,
  tests/routing/score/test_smooth_step.py::test_one_tree_over_two_experts_is_the_smooth_step,
  tests/routing/score/test_local_search.py::test_it_searches_then_keeps_the_nearest_permutation_for_any_later_logits
Differs: experts are the feed-forwards of a vision transformer, and all are computed, at evaluation too. As in the
  published code the search has no noise, and all trees of a layer share one permutation.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.model.moe.router = papers.comet(k=2, search_steps=100)
  config.model.moe.experts.init = 'independent'  # all compute all patches: equal ones would stay equal
  config.model.moe.dispatch = dict(name='reference')
  return config
