"""Expert Choice with at most three experts per patch on handwritten digits, at the compute of configs/vit_digits.py.

System: Expert Choice (capped)
Paper: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368), section 3.3. Experts take
  twice an equal share of the patches, with at most three experts per patch, and are half as wide as the dense
  feed-forward.
Command: python -m moejax.train --config=configs/capped_expert_choice_digits.py
  --workdir=runs/capped_expert_choice_digits
Cost: about two minutes on 2 CPU cores.
Expected: the accuracy of configs/expert_choice_digits.py, within a percent or two.
Proof: numbers: tests/routing/select/test_optimal_transport.py::test_bounded_plans_equal_the_linear_program,
  tests/routing/select/test_optimal_transport.py::test_the_cap_keeps_experts_from_taking_the_same_tokens
Differs: lingvo computes its plan from a softmax over tokens, and ranks and weighs by the product of the two, with more
  entropy (epsilon 0.1). Here as in the paper: over experts, by the plan, epsilon 0.001.
"""
from configs import expert_choice_digits
from moejax.routing import papers


def get_config():
  config = expert_choice_digits.get_config()
  config.model.moe.router = papers.capped_expert_choice(capacity_factor=2., cap=3.)
  return config
