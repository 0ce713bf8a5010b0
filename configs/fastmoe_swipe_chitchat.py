"""FastMoE's SWIPE gate as a decoder on dialogues: two experts per byte; in training, bytes of full experts are moved.

System: FastMoE (SWIPE gate)
Paper: He et al. 2021, "FastMoE: A Fast Mixture-of-Expert Training System" (arXiv 2103.13262); the gate is from
  its repository. Experts have half as many hidden units as the dense feed-forward.
Command: python -m moejax.train --config=configs/fastmoe_swipe_chitchat.py --workdir=runs/fastmoe_swipe_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: as configs/hash_chitchat.py or better; experts stay equally loaded in training.
Proof: numbers:
  tests/routing/select/test_assignment.py::test_swipe_is_a_queue_at_every_expert_and_then_the_free_slots_in_order
Differs: FastMoE moves tokens to another worker, and there to one expert per choice; here each worker has one expert.
  Training depends on later bytes, as published (routing_leak='train'). Experts are the residual stack of BASE layers,
  inserted between two blocks as in configs/base_chitchat.py, with 1.19 times the active compute of
  configs/dense_chitchat.py; FastMoE's are feed-forwards that replace the dense one.
"""
from configs import base_chitchat
from moejax.routing import papers


def get_config():
  config = base_chitchat.get_config()
  config.model.moe.router = papers.fastmoe_swipe(k=2)
  config.model.moe.experts.hidden = 192
  return config
