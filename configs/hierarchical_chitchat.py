"""A hierarchical mixture of experts between two LSTMs, on dialogues.

System: Hierarchical MoE
Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), appendix B: two of four groups
  for each byte, and two of the four experts in each, with noise, importance and load losses over both levels.
Command: python -m moejax.train --config=configs/hierarchical_chitchat.py --workdir=runs/hierarchical_chitchat
Cost: about three minutes on 2 CPU cores.
Result: Expected: like configs/sparsely_gated_chitchat.py, at the same number of experts per byte.
Proof: numbers:
  tests/routing/papers/test_hierarchical.py::test_weights_and_losses_equal_a_loop_over_tokens_in_float64,
  tests/routing/papers/test_hierarchical.py::test_with_one_group_it_is_the_flat_gate
Differs: nothing known; the paper has 16 groups. The code of the paper's hierarchical gate is not public.
"""
from configs import sparsely_gated_chitchat
from moejax.routing import papers


def get_config():
  config = sparsely_gated_chitchat.get_config()
  config.model.moe.router = papers.hierarchical(groups=4)
  return config
