"""THOR on dialogues: random experts instead of a router, trained to agree in two passes over each batch.

System: THOR
Paper: Zuo et al. 2021, "Taming Sparsely Activated Transformer with Stochastic Experts" (arXiv 2110.04260), sections 3
  and 4: two experts in every second layer of encoder and decoder, alpha 5, one random expert per document at
  evaluation.
Command: python -m moejax.train --config=configs/thor_t5_chitchat.py --workdir=runs/thor_t5_chitchat
Cost: about four minutes on 2 CPU cores: two passes per step.
Result: Expected: an evaluation loss that hardly depends on the sampled experts (model.*.moe.router.score.seed).
Proof: identities: tests/training/test_methods.py::test_one_expert_without_dropout_gives_twice_the_objective,
  tests/training/test_methods.py::test_an_expert_that_no_pass_draws_has_no_gradient
Differs: alpha is the published script's, whose code defaults to 1. The paper's layers 0, 2, ... are sparse; here
  1, 3, .... The task is filling in spans, not translation.
"""
from configs import t5_chitchat
from moejax.routing import papers


def get_config():
  config = t5_chitchat.get_config()
  for side in (config.model.encoder, config.model.decoder):
    side.sparse = dict(name='every', n=2)
    side.moe = dict(num_experts=2, experts=dict(name='feed_forward', hidden=256, activation='geglu'),
                    router=papers.thor(), dispatch=dict(name='grouped'), group='sequence')
  config.model.dropout = 0.1
  config.method = dict(name='consistency', alpha=5.0)
  return config
