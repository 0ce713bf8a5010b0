"""S-BASE as a decoder on dialogues, in the layer of configs/base_chitchat.py.

System: S-BASE
Paper: Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv 2202.01169), section 3.2.1. In
  training the bytes of a batch are assigned to experts by a transport plan of equal shares, at evaluation to their best
  expert.
Command: python -m moejax.train --config=configs/s_base_chitchat.py --workdir=runs/s_base_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: as configs/hash_chitchat.py or better; experts stay equally loaded in training.
Proof: numbers: tests/routing/select/test_optimal_transport.py::test_sinkhorn_plans_have_the_prescribed_marginals,
  tests/routing/select/test_optimal_transport.py::test_sinkhorn_plans_are_optimal,
  tests/routing/select/test_optimal_transport.py::test_with_little_entropy_s_base_is_the_assignment_of_base,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[s_base]
Differs: no code was published. Regularisation and number of iterations are those of the Sinkhorn baseline of
  google-research/vmoe; slots, twice an equal share, are assigned by position. Experts are the residual stack of BASE
  layers, inserted between two blocks: 1.25 times the active compute of configs/dense_chitchat.py; in the paper
  they replace every second feed-forward.
"""
from configs import base_chitchat
from moejax.routing import papers


def get_config():
  config = base_chitchat.get_config()
  config.model.moe.router = papers.s_base()
  return config
