"""Auxiliary-loss-free balancing on dialogues: a selection bias that is stepped against the load.

System: Loss-free balancing
Paper: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664);
  sigmoid gates, here renormalised over the two experts chosen.
Command: python -m moejax.train --config=configs/loss_free_chitchat.py --workdir=runs/loss_free_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: loads as even as with a balance loss, without one; not measured.
Proof: numbers: tests/routing/balance/test_balancers.py::test_a_bias_step_has_one_size_and_goes_against_the_load,
  tests/routing/test_router.py::test_a_constant_bias_changes_nothing,
  tests/routing/test_router.py::test_the_bias_gets_no_gradient,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[loss_free]
Differs: the weights are renormalised over the two experts chosen, which the paper's models do not do.
"""
from configs import mixtral_chitchat
from moejax.routing import papers


def get_config():
  config = mixtral_chitchat.get_config()
  config.model.moe.router = papers.loss_free(k=2)
  config.model.moe.router.weigh.renormalize = 'before'
  return config
