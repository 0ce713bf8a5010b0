"""RL-R on dialogues, at the active compute of configs/dense_chitchat.py: a router learned with REINFORCE.

System: RL-R
Paper: Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv 2202.01169), section 3.3: one of 8
  experts for each byte, sampled in training; the reward is the log-probability of the next byte.
Command: python -m moejax.train --config=configs/rl_routing_chitchat.py --workdir=runs/rl_routing_chitchat
Cost: about three minutes on 2 CPU cores.
Result: Expected: close to configs/switch_chitchat.py, with a router entropy that stays higher.
Proof: numbers: tests/training/test_methods.py::test_reinforce_is_the_gradient_of_the_expected_reward
Differs: no code is published. From the text: policy, reward, a learned baseline, greedy evaluation. Choices of
  this config: a linear baseline in every router, its coefficients, a balance loss of 0.01, and weighting the output of
  the sampled expert by its probability; `configs/rl_routing_chitchat.py:one` trains the router by REINFORCE only.
  Experts start at a tenth of the variance, as in configs/switch_chitchat.py; the paper does not specify it.
"""
from configs import switch_chitchat
from moejax.routing import papers


def get_config(weight='probability'):
  config = switch_chitchat.get_config()
  config.model.moe.router = papers.rl_routing(weight)
  config.model.moe.dispatch.name = 'grouped'
  config.method = dict(name='reinforce', coefficient=0.1, baseline='learned', entropy=0.01, value=0.1)
  return config
