"""fairseq's mixture-of-experts language model on dialogues, at the active compute of configs/dense_chitchat.py.

System: fairseq MoE
Paper: Artetxe et al. 2021, "Efficient Large Scale Language Modeling with Mixtures of Experts" (arXiv 2112.10684):
  top-2 in every second layer, weights renormalised over the kept experts, so that a single kept expert has weight 1.
  Later bytes compete for slots: routing_leak='slots'.
Command: python -m moejax.train --config=configs/fairseq_chitchat.py --workdir=runs/fairseq_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: close to configs/gshard_chitchat.py; not measured.
Proof: implementation: tests/oracles/test_transformers_routers.py::test_fairseq_equals_the_router_of_nllb_moe,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[fairseq]
Differs: the paper's evaluation has ceil(0.25*S) slots, here 2*ceil(S/E) as in the recipes' generation
  (`eval_fraction`). The code divides the experts' gradients by the square root of the number of workers instead of that
  number, which under Adam only changes the norm for clipping, and is omitted here. The gate is initialised with
  N(0, 0.02), in fairseq with torch's default U(-1/sqrt(D), 1/sqrt(D)).
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.update(routing_leak='slots', norm=dict(name='layer_norm'), positions=dict(name='learned', length=128),
                      head='tied')
  config.model.feed_forward = dict(hidden=512, activation='gelu')
  config.model.sparse = dict(name='every', n=2)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=256, activation='gelu'),
      router=papers.fairseq(eval_fraction=None), dispatch=dict(name='gather'), group='batch')
  return config
