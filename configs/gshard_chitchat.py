"""GShard's top-2 routing with capacity on dialogues.

System: GShard
Paper: Lepikhin et al. 2020, "GShard" (arXiv 2006.16668): the second expert is sampled, and first choices take
  slots before second ones. A later byte's first choice can take the slot of an earlier byte's second choice, which the
  decoder must accept: routing_leak='slots'.
Command: python -m moejax.train --config=configs/gshard_chitchat.py --workdir=runs/gshard_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: close to configs/mixtral_chitchat.py; not measured.
Proof: implementation:
  tests/oracles/test_transformers_routers.py::test_gshard_equals_it_where_gates_are_renormalised_before,
  tests/routing/select/test_selections.py::test_the_second_expert_comes_with_probability_g2_over_threshold_by_the_policy_random,
  tests/routing/balance/test_balancers.py::test_the_switch_loss_of_the_golden_gates,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[gshard]
Differs: lingvo takes both experts in training too (papers.gshard(second='all')), Mesh TensorFlow compares g2 with 0.2,
  not 0.5, at evaluation too; we follow the paper.
"""
from configs import mixtral_chitchat
from moejax.routing import papers


def get_config():
  config = mixtral_chitchat.get_config()
  config.model.routing_leak = 'slots'
  config.model.moe.router = papers.gshard(capacity_factor=1.25, eval_capacity_factor=2.)
  config.model.moe.dispatch.name = 'gather'
  config.model.moe.group = 'sequence'
  return config
