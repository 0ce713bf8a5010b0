"""DeepSpeed's PR-MoE on dialogues: a pyramid of residual mixtures, with Random Token Selection.

System: DeepSpeed-MoE
Paper: Rajbhandari et al. 2022, "DeepSpeed-MoE" (arXiv 2201.05596), section 4.1: every token uses a fixed
  feed-forward and one expert, added with two learned weights; later layers have more experts (4, then 8). In training a
  full expert keeps random tokens, so training depends on later bytes and evaluation does not: routing_leak='train'.
Command: python -m moejax.train --config=configs/deepspeed_pr_moe_chitchat.py --workdir=runs/deepspeed_pr_moe_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: close to configs/mixtral_chitchat.py; not measured.
Proof: numbers:
  tests/layers/test_residual_and_pyramid.py::test_the_softmax_gate_weighs_the_routed_and_the_fixed_expert_token_by_token,
  tests/layers/test_residual_and_pyramid.py::test_the_parameters_of_a_pyramid_equal_the_formula,
  tests/routing/papers/test_codebases.py::test_deepspeed_keeps_every_token_equally_often,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[deepspeed]
Differs: the paper's figure shows a plain sum of the two branches, the code weighs them with a softmax; we follow the
  code (shared_gate='sum' is the paper's). The code selects tokens at random at evaluation too; here evaluation is by
  position. The paper's models have a mixture in every second layer; here in both layers. In the code all experts of a
  layer and the fixed feed-forward start as copies of one; here they are initialised independently.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.routing_leak = 'train'
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=[4, 8], experts=dict(name='feed_forward', hidden=192, activation='swiglu'),
      router=papers.deepspeed(k=1), dispatch=dict(name='gather'), group='sequence',
      shared=dict(name='feed_forward', hidden=192, activation='swiglu'), shared_gate='softmax')
  return config
