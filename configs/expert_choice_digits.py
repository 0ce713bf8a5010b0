"""Expert Choice on handwritten digits, at the active compute of configs/vit_digits.py.

System: Expert Choice
Paper: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368). Experts take twice an equal
  share of the patches (capacity factor 2) and are half as wide as the dense feed-forward.
Command: python -m moejax.train --config=configs/expert_choice_digits.py --workdir=runs/expert_choice_digits
Cost: about two minutes on 2 CPU cores.
Result: experiments/digits/results.json, and the table in README.md.
Proof: numbers:
  tests/routing/select/test_selections.py::test_every_expert_takes_exactly_its_capacity_of_the_tokens_that_want_it_most,
  tests/routing/weigh/test_weightings.py::test_expert_choice_weights_are_the_probabilities_of_the_tokens_taken,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[expert_choice]
Differs: nothing known for this form; Mesh TensorFlow's `expert_selection`, a softmax over tokens, is a different
  router.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.model.moe.router = papers.expert_choice(capacity_factor=2.)
  config.model.moe.experts.init = 'independent'
  return config
