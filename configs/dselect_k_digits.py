"""DSelect-k on handwritten digits: two of eight experts for each patch, by continuously differentiable gates.

System: DSelect-k
Paper: Hazimeh et al. 2021, "DSelect-k" (arXiv 2106.03760), the per-example gate, replacing V-MoE's in
  configs/vmoe_digits.py; all experts are computed.
Command: python -m moejax.train --config=configs/dselect_k_digits.py --workdir=runs/dselect_k_digits
Cost: about two minutes on 2 CPU cores.
Result: Expected: the accuracy of V-MoE within a point, and an entropy of weights that falls from log 8.
Proof: numbers: tests/routing/score/test_smooth_step.py::test_dselect_k_is_the_mixture_of_its_selectors,
  tests/routing/score/test_smooth_step.py::test_a_saturated_gate_has_at_most_k_experts_whose_weights_sum_to_one,
  tests/routing/score/test_smooth_step.py::test_gradients_equal_finite_differences_everywhere
Differs: the paper mixes whole networks for several tasks; here experts are the feed-forwards of a vision transformer,
  and the entropy loss, a sum over examples in the published code, is a mean over patches, so that it does not grow
  with their number.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  router = papers.dselect_k(k=2, entropy=1e-3)
  for loss in router['balance'].values():
    loss['reduction'] = 'mean'
  config.model.moe.router = router
  config.model.moe.experts.init = 'independent'  # all compute all patches: equal ones would stay equal
  config.model.moe.dispatch = dict(name='reference')
  return config
