"""st-moe-pytorch, and mixture-of-experts before it: ST-MoE's routing for n experts a token."""
from typing import Any

from moejax.routing.further_choices import Policy
from moejax.routing.papers import paper


@paper('ST-MoE: Designing Stable and Transferable Sparse Expert Models', '2202.08906', draws=True,
       example=dict(n=3, capacity_factor=1.), alone=dict(n=1))
def lucidrains(n: int = 2, threshold: float | tuple[float, ...] = 0.2, policy: Policy = 'random',
               eval_policy: Policy = 'random', capacity_factor: float = 1.25, eval_capacity_factor: float | None = 2.,
               straight_through: bool = False, z: float = 1e-3) -> dict[str, Any]:
  """lucidrains/st-moe-pytorch: a reading of ST-MoE (arXiv 2202.08906) with n experts.

  The n best of the softmax, renormalised before anything is dropped; each further expert goes with probability
  min(1, g / threshold), a threshold for each rank, at evaluation too. Capacity as in Mesh TensorFlow; balance loss over
  first choices with 0.01, z-loss with 0.001. `straight_through` (its default; here it needs dispatch 'einsum') gives
  dispatch the gradient of the combine weights.

  `policy` 'all', 'none' and 'threshold' are of lucidrains/mixture-of-experts, where n = 2 and z = 0: with 'none' a
  token has one expert, whose weight is still its share of the two best.
  """
  return dict(
      score=dict(name='linear', init_std='1/sqrt(D)'),
      select=dict(name='top_n', k=n, policy=policy, eval_policy=eval_policy, threshold=threshold),
      weigh=dict(name='softmax', order='before', renormalize='before'),
      place=dict(name='straight_through' if straight_through else 'capacity', capacity_factor=capacity_factor,
                 eval_capacity_factor=eval_capacity_factor, convention='mesh_tensorflow'),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard'), **(dict(z=z) if z else {})))
