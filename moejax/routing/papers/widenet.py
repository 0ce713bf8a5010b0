"""WideNet: one mixture of experts shared by all layers."""
from typing import Any

from moejax.routing.papers import paper


@paper('Go Wider Instead of Deeper', '2107.11817', draws=True, example=dict(capacity_factor=0.6), alone=dict(k=1))
def widenet(k: int = 2, capacity_factor: float = 1.2, released: bool = False) -> dict[str, Any]:
  """Go Wider Instead of Deeper (arXiv 2107.11817).

  Section 2.2: softmax of the noisy logits, noise N(0, 1/E^2) in training, the k best, not renormalised; balance loss
  over all k choices, coefficient 0.01. All layers share one router and one set of experts, each with its own norms: the
  model's `sharing='all_but_norms'`. The router is initialised as in the code, a Keras layer. `released`: slots as in
  XueFuzhao/WideNet_Code: one less than int(S*k*factor/E), token by token, so that a second choice precedes a later
  token's first.
  """
  place = dict(convention='widenet', order='token') if released else {}
  return dict(
      score=dict(name='linear', init_std='xavier', noise_std='1/E'),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, **place),
      balance=dict(switch=dict(coefficient=0.01, convention='moejax')))
