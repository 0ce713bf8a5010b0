"""ST-MoE: stable top-2 routing with a z-loss."""
from typing import Any

from moejax.routing.papers import paper


@paper('ST-MoE: Designing Stable and Transferable Sparse Expert Models', '2202.08906', draws=True,
       example=dict(capacity_factor=1.), alone=None)
def st_moe(capacity_factor: float = 1.25, eval_capacity_factor: float | None = 2.) -> dict[str, Any]:
  """ST-MoE (arXiv 2202.08906).

  Section 3.3, equations 5-6: router z-loss with c_z = 0.001 besides the balance loss with 0.01. Section 4: top-2,
  capacity factor 1.25 in training and 2.0 at evaluation. As in Mesh TensorFlow, which the paper used: the second expert
  is kept with probability min(1, g2 / 0.2), at evaluation too; gates are renormalised before dropping; the capacity
  formula ignores k.
  """
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='gshard_top_2', second='random', eval_second='random', threshold=0.2),
      weigh=dict(name='softmax', order='before', renormalize='before'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
                 convention='mesh_tensorflow'),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard'), z=0.001))
