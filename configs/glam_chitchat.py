"""GLaM on dialogues, at the active compute of configs/dense_chitchat.py: two of 8 experts in every second layer.

System: GLaM
Paper: Du et al. 2021, "GLaM: Efficient Scaling of Language Models with Mixture-of-Experts" (arXiv 2112.06905), section
  4: a mixture, then a dense layer; RMSNorm, gated GELU, relative position biases, embedding shared with the output,
  z-loss 1e-4 of the output's softmax; always two experts, with weights renormalised before capacity. Later bytes
  compete for slots: routing_leak='slots'.
Command: python -m moejax.train --config=configs/glam_chitchat.py --workdir=runs/glam_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: close to configs/gshard_chitchat.py; not measured.
Proof: numbers: tests/routing/papers/test_codebases.py::test_glam_keeps_the_choices_of_a_queue_and_renormalises_before,
  tests/layers/test_sparse_layouts.py::test_glam_starts_with_a_sparse_layer,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[glam]
Differs: in the published code every layer has its own position bias, here all share one. Its optimizer is
  Adafactor with a learning rate of 1/sqrt(step); here AdamW as in the other configs.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.update(
      routing_leak='slots', attention=dict(heads=4, scale='none'), head='tied_scaled',
      positions=dict(name='relative_bias', buckets=32, max_distance=128), embedding_init=dict(name='normal', std=1.))
  config.model.feed_forward = dict(hidden=384, activation='geglu')
  config.model.sparse = dict(name='every', n=2, first=0)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=192, activation='geglu'),
      router=papers.glam(), dispatch=dict(name='gather'), group='sequence')
  config.objective.z_loss = 1e-4
  return config
