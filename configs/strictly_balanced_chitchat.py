"""Strictly balanced gating on dialogues: experts choose bytes in training, thresholds select at evaluation.

System: Sparsely-gated MoE (strictly balanced)
Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), appendix F. Two experts per byte
  on average, each with half as many hidden units as the dense feed-forward.
Command: python -m moejax.train --config=configs/strictly_balanced_chitchat.py --workdir=runs/strictly_balanced_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: as configs/hash_chitchat.py or better; experts stay equally loaded in training.
Proof: numbers: tests/routing/papers/test_expert_choice.py::test_the_batchwise_choice_is_a_sort_of_every_column,
  tests/routing/papers/test_expert_choice.py::test_learned_thresholds_let_as_many_tokens_through_as_experts_take
Differs: the paper states neither the weight of the thresholds' loss nor their initial values; training depends on later
  bytes, as published (routing_leak='train'). Experts are the residual stack of BASE layers, inserted between two blocks
  as in configs/base_chitchat.py, with 1.19 times the active compute of configs/dense_chitchat.py in training; the
  paper's are two matrices between LSTMs.
"""
from configs import base_chitchat
from moejax.routing import papers


def get_config():
  config = base_chitchat.get_config()
  config.model.moe.router = papers.strictly_balanced(k=2)
  config.model.moe.experts.hidden = 192
  return config
