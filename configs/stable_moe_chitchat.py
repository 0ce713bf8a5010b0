"""StableMoE as a decoder on dialogues: routing is learned in the first tenth of training, then distilled and frozen.

System: StableMoE
Paper: Dai et al. 2022, "StableMoE: Stable Routing Strategy for Mixture of Experts" (arXiv 2204.08396), section 3: one
  of 8 residual experts for each byte, in an extra layer between two blocks.
Command: python -m moejax.train --config=configs/stable_moe_chitchat.py --workdir=runs/stable_moe_chitchat
Cost: about two minutes on 2 CPU cores.
Result: Expected: a little below configs/dense_chitchat.py, and no byte changes its expert after step 30.
Proof: numbers: tests/routing/papers/test_stable_moe.py::test_both_losses_are_those_derived_by_hand,
  tests/routing/papers/test_stable_moe.py::test_stage_2_routes_are_a_function_of_the_id_that_no_step_changes,
  tests/routing/papers/test_stable_moe.py::test_evaluation_is_distilled_in_stage_1_too
Differs: the published code freezes the distilled router by stopping its gradient; here stage 2 reads a copy from the
  router's state, so that momentum and weight decay cannot change it either. Losses are means over tokens instead of
  sums, consistent with the language model's loss in each code. Of its distilled routers the Transformer is not
  supported; the convolution is `words='convolution'`.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.update(sparse=dict(name='layers', indices=(0,)), sparse_form='insert')
  config.model.moe = dict(
      num_experts=8, experts=dict(name='residual_stack', hidden=512, sublayers=1),
      router=papers.stable_moe(vocab_size=config.model.vocab_size, stage_1_steps=config.training.steps // 10),
      dispatch=dict(name='gather'), group='batch')
  return config
