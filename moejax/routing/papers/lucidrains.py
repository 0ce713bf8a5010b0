"""st-moe-pytorch and its predecessor mixture-of-experts: ST-MoE's routing with n experts per token."""
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax.ranges import NonNegative
from moejax.routing.balance.switch import switch_loss
from moejax.routing.papers import paper
from moejax.routing.select.thresholded_top_k import Policy
from moejax.routing.stages import BALANCERS, Balancer, Routed

Counts = Literal['all', 'kept']


@BALANCERS('kept_switch')
class KeptSwitch(Balancer):
  """`E * sum_e F_e P_e`, where F_e is the share of tokens with a slot in their first choice e; at most `switch_loss`.

  As in st-moe-pytorch, where dropping modifies in place the mask of first choices that the loss reads.
  """

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    first = routed.plan.expert[..., :1]
    # Tokens choose no expert twice, so if the first choice's expert is computed, it is the first choice.
    kept = jnp.take_along_axis(routed.placed.shares(), first, axis=-1) > 0
    return switch_loss(routed.probs, first, kept, routed.valid, 'flaxformer')  # flaxformer: does not renormalise F


@paper('ST-MoE: Designing Stable and Transferable Sparse Expert Models', '2202.08906', draws=True,
       example=dict(n=3, capacity_factor=1.), alone=dict(n=1))
def lucidrains(n: int = 2, threshold: float | tuple[float, ...] = 0.2, policy: Policy = 'random',
               eval_policy: Policy = 'random', capacity_factor: float = 1.25, eval_capacity_factor: float | None = 2.,
               straight_through: bool = False, z: float = 1e-3, balance_counts: Counts = 'kept') -> dict[str, Any]:
  """lucidrains/st-moe-pytorch: an implementation of ST-MoE (arXiv 2202.08906) generalised to n experts.

  The n best of the softmax, renormalised before anything is dropped; each expert after the first is kept with
  probability min(1, g / threshold), with a threshold per rank, at evaluation too. Capacity as in Mesh TensorFlow;
  balance loss over first choices that have a slot, coefficient 0.01; z-loss with 0.001. `straight_through` (the default
  there; here it needs dispatch 'einsum') gives dispatch the gradient of the combine weights.

  `policy` 'all', 'none' and 'threshold' are from lucidrains/mixture-of-experts, where n = 2, z = 0 and
  balance_counts = 'all': with 'none' a token has one expert, still weighted by its share of the best two.
  """
  balance = dict(kept_switch=0.01) if balance_counts == 'kept' else dict(
      switch=dict(coefficient=0.01, convention='gshard'))
  return dict(
      score=dict(name='linear', init_std='torch_linear'),
      select=dict(name='thresholded_top_k', k=n, policy=policy, eval_policy=eval_policy, threshold=threshold),
      weigh=dict(name='softmax', order='before', renormalize='before'),
      place=dict(name='straight_through' if straight_through else 'capacity', capacity_factor=capacity_factor,
                 eval_capacity_factor=eval_capacity_factor, convention='mesh_tensorflow'),
      balance=balance | (dict(z=z) if z else {}))
