"""The hierarchical layer of Mesh TensorFlow in a decoder on dialogues.

System: MoE2D
Paper: Shazeer et al. 2018, "Mesh-TensorFlow" (arXiv 1811.02084), whose library has the layer `MoE2D`: two of four
  groups and two experts of the first, one of the second; capacities and balance losses at both levels.
Command: python -m moejax.train --config=configs/moe_2d_chitchat.py --workdir=runs/moe_2d_chitchat
Cost: about four minutes on 2 CPU cores.
Result: Expected: like configs/gshard_chitchat.py.
Proof: implementation:
  tests/oracles/test_mixture_of_experts.py::test_moe_2d_is_the_hierarchical_layer_of_lucidrains,
  tests/routing/papers/test_hierarchical.py::test_moe_2d_is_a_loop_over_slots,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[moe_2d]
Differs: the inner balance loss is a mean over the tokens whose first choice is the group, before anything is dropped;
  in Mesh TensorFlow and lucidrains it is over the slots of the group, including empty ones. There the inner gate may
  pool the slots of several routing groups; here each has its own.
"""
from configs import gshard_chitchat
from moejax.routing import papers


def get_config():
  config = gshard_chitchat.get_config()
  config.model.moe.num_experts = 16
  config.model.moe.router = papers.moe_2d(groups=4)
  return config
