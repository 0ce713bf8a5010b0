"""WideNet: one mixture of experts for all layers."""
from typing import Any

from moejax.routing.papers import paper


@paper('Go Wider Instead of Deeper', '2107.11817', draws=True, example=dict(capacity_factor=0.6), alone=dict(k=1))
def widenet(k: int = 2, capacity_factor: float = 1.2, released: bool = False) -> dict[str, Any]:
  """Go Wider Instead of Deeper (arXiv 2107.11817).

  Section 2.2: softmax of the noisy logits, noise N(0, 1/E^2) in training, the k best, not renormalised; balance loss
  over all k choices, coefficient 0.01. That one router and one set of experts serve all layers, each with norms of its
  own, is the model's `sharing='all_but_norms'`. The router starts as the code's, a Keras layer. `released`: slots as
  XueFuzhao/WideNet_Code gives them out: one less than int(S*k*factor/E), token by token, so that a second choice goes
  before a later token's first.
  """
  place = dict(convention='widenet', order='token') if released else {}
  return dict(
      score=dict(name='linear', init_std='xavier', noise_std='1/E'),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, **place),
      balance=dict(switch=dict(coefficient=0.01, convention='moejax')))
