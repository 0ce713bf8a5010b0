"""Mixtral's layer on dialogues, at the active compute of configs/dense_chitchat.py: two of 8 experts, dropless.

System: Mixtral
Paper: Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088); dropless as in MegaBlocks (arXiv 2211.15841). Each
  expert is half as wide as the dense feed-forward.
Command: python -m moejax.train --config=configs/mixtral_chitchat.py --workdir=runs/mixtral_chitchat
Cost: about three minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
Proof: implementation: tests/oracles/test_transformers_models.py::test_sparse_decoder_equals_mixtral,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[top_k_dropless]
Differs: the paper gives no balance loss. We follow Hugging Face transformers, which pools the tokens of all layers;
  here every layer has its own loss, and they are summed.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=192, activation='swiglu'),
      router=papers.top_k_dropless(k=2), dispatch=dict(name='grouped'), group='batch')
  return config
