"""WideNet on handwritten digits: one attention, one router and one set of experts at all 4 depths.

System: WideNet
Paper: Xue et al. 2021, "Go Wider Instead of Deeper" (arXiv 2107.11817), section 2: layers share everything but their
  layer norms, so a token may be routed to different experts at different depths. The model of configs/vit_digits.py
  with all layers sparse; sharing='all' and sparse=dict(name='none') make it ALBERT.
Command: python -m moejax.train --config=configs/widenet_digits.py --workdir=runs/widenet_digits
Cost: about two minutes on 2 CPU cores.
Expected: an accuracy near that of configs/vmoe_digits.py with a third of its parameters; not measured.
Proof: numbers: tests/layers/test_sharing.py::TestSharing::test_is_the_stack_whose_layers_are_copies,
  tests/layers/test_sharing.py::TestSharing::test_the_gradient_of_shared_parameters_is_the_sum_over_layers,
  tests/layers/test_sharing.py::TestSharing::test_counts_parameters_once_and_flops_as_often_as_they_are_used,
  tests/layers/test_sharing.py::test_one_expert_that_all_share_is_the_dense_shared_block,
  tests/routing/papers/test_training_steps.py::test_a_training_step_and_its_losses_equal_a_loop[widenet]
Differs: the released code assigns one slot less than its formula, token by token, and has a second GELU after the
  experts' output; we follow the paper; papers.widenet(released=True) has the slots of the code. The router is
  initialised as in the code (Glorot uniform).
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.model.sharing = 'all_but_norms'
  config.model.sparse = dict(name='every', n=1)
  config.model.moe.num_experts = 4
  config.model.moe.router = papers.widenet(k=2)
  config.model.moe.experts.init = 'independent'
  return config
