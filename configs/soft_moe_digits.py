"""Soft MoE on handwritten digits, at the active compute of configs/vit_digits.py.

System: Soft MoE
Paper: Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts" (arXiv 2308.00951). 8 experts with 2 slots
  each have as many slots as an image has patches, so experts are as wide as the dense feed-forward. Each image is a
  group.
Command: python -m moejax.train --config=configs/soft_moe_digits.py --workdir=runs/soft_moe_digits
Cost: about two minutes on 2 CPU cores.
Result: experiments/digits/results.json, and the table in README.md.
Proof: identities: tests/routing/select/test_selections.py::test_soft_dispatch_is_a_distribution_over_valid_tokens,
  tests/routing/weigh/test_weightings.py::test_soft_moe_combine_weights_are_a_softmax_over_all_slots_of_all_experts,
  tests/routing/score/test_scores.py::test_soft_moe_logits_are_scaled_cosines
Differs: kernels of attention and feed-forwards are initialised with fan-in truncated normals, in google-research/vmoe
  xavier-uniform; the initialisation of slots and the epsilon inside the root of the norms are as there.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=256, init='identical'), router=papers.soft_moe(slots=2),
      dispatch=dict(name='einsum'), group='sequence')
  return config
