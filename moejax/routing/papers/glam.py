"""GLaM: two of 64 experts, always both."""
from typing import Any

from moejax.routing.papers import paper


@paper('GLaM: Efficient Scaling of Language Models with Mixture-of-Experts', '2112.06905', alone=None,
       example=dict(capacity_factor=1.))
def glam(capacity_factor: float = 2., eval_capacity_factor: float | None = None) -> dict[str, Any]:
  """GLaM (arXiv 2112.06905), as in praxis/layers/glam.py and lingvo.

  GShard's gating with both experts always taken; gates renormalised before anything is dropped; balance loss over first
  choices, coefficient 0.01; capacity int(S*factor/E) rounded up to a multiple of 4, for any k.
  """
  return dict(
      score=dict(name='linear', init_std='1/sqrt(D)'),
      select=dict(name='gshard_top_2', second='all'),
      weigh=dict(name='softmax', order='before', renormalize='before'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
                 convention='lingvo'),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
