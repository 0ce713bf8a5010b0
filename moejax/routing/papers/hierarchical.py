"""Hierarchical mixtures of experts: gates choose groups, then experts within them."""
from typing import Any

from moejax.routing.papers import paper
from moejax.routing.select.hierarchical import SecondChoice


@paper('Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer', '1701.06538', draws=True,
       exchangeable=False, example=dict(groups=2, groups_per_token=2, per_group=1),
       alone=dict(groups=1, groups_per_token=1, per_group=1))
def hierarchical(groups: int = 16, groups_per_token: int = 2, per_group: int = 2, importance: float = 0.1,
                 load: float = 0.1, noise_floor: float = 1e-2) -> dict[str, Any]:
  """The hierarchical mixture of Outrageously Large Neural Networks (arXiv 1701.06538), appendix B.

  Noisy top-k gating at both levels, output weight `G_primary_i * G_ij` (equation 12), importance and load losses over
  all experts (equations 13-14). Appendix C.1: two of 16 groups, and two experts in each.
  """
  choices = dict(groups_per_token=groups_per_token, per_group=per_group)
  return dict(
      score=dict(name='hierarchical', groups=groups, noise='learned', init_std=0., noise_floor=noise_floor),
      select=dict(name='hierarchical_top_k', groups=groups, **choices),
      weigh=dict(name='hierarchical', groups=groups),
      place=dict(name='dropless'),
      balance=dict(gate_importance=importance, hierarchical_load=dict(coefficient=load, **choices)))


@paper('Mesh-TensorFlow: Deep Learning for Supercomputers (its layer MoE2D)', '1811.02084', draws=True,
       exchangeable=False, example=dict(groups=2, capacity_factor=0.5, eval_capacity_factor=0.5), alone=dict(groups=1))
def moe_2d(groups: int = 4, second: SecondChoice = 'random', eval_second: SecondChoice = 'random',
           capacity_factor: float = 1.25, eval_capacity_factor: float = 2.,
           second_level_factor: float = 1.) -> dict[str, Any]:
  """`MoE2D` of Mesh TensorFlow (the library of arXiv 1811.02084), and `HeirarchicalMoE` of lucidrains.

  Two groups per token: two experts of the first, and one of the second, whose inputs have an "importance" of 1 and 0.5;
  sampled second choices at both levels, at evaluation too; gates renormalised before anything is dropped; capacities of
  groups and of experts; 0.01 times the sum of the balance losses of both levels.
  """
  return dict(
      score=dict(name='hierarchical', groups=groups, noise='none', init_std=0.02),
      select=dict(name='hierarchical_top_2', groups=groups, second=second, eval_second=eval_second, threshold=0.2),
      weigh=dict(name='hierarchical', groups=groups),
      place=dict(name='two_level_capacity', groups=groups, capacity_factor=capacity_factor,
                 eval_capacity_factor=eval_capacity_factor, second_level_factor=second_level_factor),
      balance=dict(hierarchical_switch=0.01))
