"""BASE layers as a decoder on dialogues: an extra layer between two blocks of configs/dense_chitchat.py.

System: BASE layers
Paper: Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models" (arXiv 2103.16716), section 3.
  All 2,048 bytes of a batch are assigned jointly, 256 to each of 8 experts; at evaluation each takes its best expert.
Command: python -m moejax.train --config=configs/base_chitchat.py --workdir=runs/base_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: as configs/hash_chitchat.py or better; experts stay equally loaded in training.
Proof: numbers: tests/routing/select/test_assignment.py::test_the_total_score_is_within_eps_a_token_of_the_best_assignment,
  tests/routing/select/test_assignment.py::test_every_expert_gets_the_same_number_of_tokens,
  tests/routing/papers/test_training_steps.py::test_base_is_balanced_and_weighs_by_the_sigmoid_of_the_affinity
Differs: training depends on later bytes of the batch, as published (routing_leak='train'). Biases of the residual stack
  start at zero, unlike those of fairseq's second matrix: here the layer starts as exactly the identity.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.update(sparse=dict(name='layers', indices=(0,)), sparse_form='insert', routing_leak='train')
  config.model.moe = dict(
      num_experts=8, experts=dict(name='residual_stack', hidden=512, sublayers=1), router=papers.base(),
      dispatch=dict(name='grouped'), group='batch')
  return config
