"""The options of lucidrains/st-moe-pytorch on dialogues: three experts per byte, with a threshold per rank.

System: st-moe-pytorch
Paper: Zoph et al. 2022, "ST-MoE" (arXiv 2202.08906), as implemented by lucidrains/st-moe-pytorch and
  mixture-of-experts: sampled second and third experts, at evaluation too; gradient through dispatch; gated experts with
  a learned scale per hidden unit; one more feed-forward after the mixture. Later bytes compete for slots:
  routing_leak='slots'.
Command: python -m moejax.train --config=configs/lucidrains_chitchat.py --workdir=runs/lucidrains_chitchat
Cost: about four minutes on 2 CPU cores.
Expected: close to configs/gshard_chitchat.py; not measured.
Proof: numbers: tests/routing/select/test_thresholded_top_k.py::test_each_rank_counts_as_often_as_its_threshold_says,
  tests/routing/place/test_straight_through.py::test_straight_through_gives_dispatch_the_gradient_of_the_weights,
  tests/experts/test_scaled_geglu.py::test_is_the_loop_over_rows,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[lucidrains]
Differs: coordinate-descent top-k and Gumbel noise on its logits, both off by default there, are omitted. The extra
  feed-forward is a plain GEGLU, there one of its experts, with biases and a learned scale. Gelu is the tanh
  approximation.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.routing_leak = 'slots'
  config.model.sparse = dict(name='every', n=2)
  config.model.extra_feed_forward = dict(hidden=128, activation='geglu')
  config.model.moe = dict(
      num_experts=8, experts=dict(name='scaled_geglu', hidden=128),
      router=papers.lucidrains(n=3, threshold=(0.2, 0.4), straight_through=True),
      dispatch=dict(name='einsum'), group='sequence')
  return config
