"""V-MoE: vision transformers with noisy top-k routing and Batch Prioritized Routing."""
from typing import Any

from moejax.routing.papers import paper
from moejax.routing.place.capacity import Priority


@paper('Scaling Vision with Sparse Mixture of Experts', '2106.05974', draws=True,
       example=dict(capacity_factor=0.6), alone=dict(k=1))
def vmoe(k: int = 2, capacity_factor: float = 1.05, eval_capacity_factor: float | None = None,
         priority: Priority = 'batch') -> dict[str, Any]:
  """Scaling Vision with Sparse Mixture of Experts (arXiv 2106.05974).

  Section 2: g(x) = TOP_k(softmax(Wx + N(0, 1/E^2))), softmax before the top-k and no renormalisation; noise in
  training only. Appendix A: importance loss on clean probabilities and load loss, 0.01 times their average.
  Section 4: Batch Prioritized Routing (`priority='batch'`; 'position' is the paper's vanilla routing and the default
  of the released configs in training). Losses and capacity, a multiple of 4, as in google-research/vmoe.
  """
  return dict(
      score=dict(name='linear', init_std='1/sqrt(D)', noise_std='1/E'),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
                 convention='vmoe', priority=priority),
      balance=dict(importance=0.005, load=0.005))
