"""GMoE on handwritten digits: V-MoE with a cosine router.

System: GMoE
Paper: Li et al. 2022, "Sparse Mixture-of-Experts are Domain Generalizable Learners" (arXiv 2206.04046), section 4: one
  of 6 experts for each patch in two of the later layers, as in its DeiT-S/16, which starts from pretrained parameters.
Command: python -m moejax.train --config=configs/gmoe_digits.py --workdir=runs/gmoe_digits
Cost: about a minute and a half on 2 CPU cores.
Result: Expected: as configs/vmoe_digits.py; for the paper's topic, unseen domains, see the claim `gmoe` of
  experiments/paper_effects/claims.py.
Proof: numbers: tests/routing/score/test_cosine.py::test_gmoe_is_tutel_s_router_token_by_token,
  tests/routing/score/test_cosine.py::test_tutel_s_losses_are_a_loop_over_tokens_and_experts,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[gmoe]
Differs: k is 1 as in the code. The load loss is Tutel's, which compares probabilities with logits
  (papers.gmoe(balance='vmoe') compares logits with logits, and has V-MoE's variance). The code's experts start as
  copies of a pretrained feed-forward, here they are initialised independently.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.model.sparse = dict(name='every', n=2)
  config.model.stochastic_depth = 0.1
  config.model.moe.num_experts = 6
  config.model.moe.experts = dict(name='feed_forward', hidden=256, use_bias=True, dropout=0.1)
  config.model.moe.router = papers.gmoe(dim=32)
  return config
