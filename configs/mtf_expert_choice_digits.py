"""Expert Choice as in Mesh TensorFlow on handwritten digits, near the active compute of configs/vit_digits.py.

System: Expert Choice (Mesh TensorFlow)
Paper: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368), as Mesh TensorFlow's
  `expert_selection`: a softmax over patches, a mean over the experts of a patch, and a loss.
Command: python -m moejax.train --config=configs/mtf_expert_choice_digits.py --workdir=runs/mtf_expert_choice_digits
Cost: about two minutes on 2 CPU cores.
Expected: the accuracy of configs/expert_choice_digits.py, within a percent or two.
Proof: numbers: tests/routing/papers/test_expert_choice.py::test_mesh_tensorflow_weighs_by_a_softmax_over_tokens
Differs: from the paper in all of the above, deliberately.
"""
from configs import expert_choice_digits
from moejax.routing import papers


def get_config():
  config = expert_choice_digits.get_config()
  config.model.moe.router = papers.mtf_expert_choice()
  config.model.moe.experts.hidden = 256
  return config
