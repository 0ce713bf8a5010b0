"""Switch Transformer as a decoder on dialogues, at the active compute of configs/dense_chitchat.py.

System: Switch Transformer
Paper: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961): one of 8 experts for each byte in each layer;
  slots are assigned by position, so that no byte depends on a later one.
Command: python -m moejax.train --config=configs/switch_chitchat.py --workdir=runs/switch_chitchat
Cost: about three minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
Proof: implementation:
  tests/oracles/test_transformers_models.py::test_sparse_encoder_decoder_equals_switch_transformers,
  tests/oracles/test_transformers_routers.py::test_switch_equals_its_sparse_layer,
  tests/routing/place/test_retry.py::test_retries_equal_a_loop_over_rounds_and_tokens,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[switch]
Differs: the layers of this decoder are all sparse and have SwiGLU, in the paper's encoder-decoder every
  second layer is sparse, with ReLU. Transformers' capacity is a number of slots per sequence; we follow Mesh
  TensorFlow's factor. Only experts start at a tenth of the variance, all three matrices; in the paper attention, dense
  feed-forwards and the head do too.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=384, activation='swiglu', init_scale=0.1),
      router=papers.switch(), dispatch=dict(name='gather'), group='sequence')
  return config
