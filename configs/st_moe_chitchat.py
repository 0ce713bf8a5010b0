"""ST-MoE on dialogues, at the active compute of configs/t5_chitchat.py plus one dense feed-forward per sparse layer.

System: ST-MoE
Paper: Zoph et al. 2022, "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (arXiv 2202.08906): top-2
  with capacity, router z-loss, every second layer (the paper's models: every fourth) sparse and followed by one more
  dense feed-forward. In the decoder the routing lets later bytes compete for slots, as in the paper's models:
  routing_leak='slots'.
Command: python -m moejax.train --config=configs/st_moe_chitchat.py --workdir=runs/st_moe_chitchat
Cost: about three minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
Proof: numbers:
  tests/routing/balance/test_balancers.py::test_the_z_loss_at_zero_logits_is_the_squared_logarithm_of_e_and_its_gradient_two_log_z_softmax_over_t,
  tests/routing/select/test_selections.py::test_the_second_expert_comes_with_probability_g2_over_threshold_by_the_policy_random,
  tests/routing/weigh/test_weightings.py::test_the_survivor_of_two_experts_has_the_weight_of_its_convention,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[st_moe]
Differs: flaxformer's port has neither renormalisation nor a sampled second expert; we follow Mesh TensorFlow, in which
  the paper's models were trained. Only experts start at a tenth of the variance; in the published configs attention,
  dense feed-forwards and the head do too.
"""
from configs import t5_chitchat
from moejax.routing import papers


def get_config():
  config = t5_chitchat.get_config()
  config.model.routing_leak = 'slots'
  for side in (config.model.encoder, config.model.decoder):
    side.update(sparse=dict(name='every', n=2), extra_feed_forward=dict(hidden=256, activation='geglu'), moe=dict(
        num_experts=8, experts=dict(name='feed_forward', hidden=128, activation='geglu', init_scale=0.1),
        router=papers.st_moe(), dispatch=dict(name='gather'), group='batch'))
  return config
