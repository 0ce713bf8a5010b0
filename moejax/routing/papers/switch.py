"""Switch Transformer: one expert a token."""
from typing import Any

from moejax.routing.papers import paper


@paper('Switch Transformers: Scaling to Trillion Parameter Models', '2101.03961', draws=True,
       example=dict(capacity_factor=1., eval_capacity_factor=None))
def switch(capacity_factor: float = 1.25, eval_capacity_factor: float | None = 2.) -> dict[str, Any]:
  """Switch Transformers (arXiv 2101.03961).

  Equations 1-2 with k = 1: the output is the softmax probability times that of the best expert, not renormalised, so
  that the router has a gradient. Equation 3: capacity in the order of positions. Equations 4-6: balance loss, alpha =
  0.01. Appendix C: input jitter of 1e-2. Capacity by the formula of Mesh TensorFlow, where the paper's runs were;
  kernel N(0, 0.02) of flaxformer.
  """
  return dict(
      score=dict(name='linear', init_std=0.02, jitter=0.01),
      select=dict(name='top_k', k=1),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
                 convention='mesh_tensorflow'),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
