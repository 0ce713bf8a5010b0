"""Auxiliary-loss-free balancing: a selection bias instead of a loss."""
from typing import Any

from moejax.routing.papers import paper


@paper('Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts', '2408.15664', example=dict(k=2),
       alone=dict(k=1))
def loss_free(k: int = 6, rate: float = 1e-3) -> dict[str, Any]:
  """Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts (arXiv 2408.15664).

  Section 3, Algorithm 1: select the k experts with the largest sigmoid gate plus bias, weigh by the gate alone; after
  every training step b_e += u * sign(mean load - load_e) over the whole batch, u = 0.001. The bias depends on past
  batches only, so nothing leaks from later tokens. Backbone: DeepSeekMoE, 6 routed experts per token.
  """
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='top_k', k=k),
      weigh=dict(name='sigmoid', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(bias=dict(rate=rate)))
