"""Switch Transformer: one expert per token."""
from typing import Any, Literal

from moejax.routing.papers import paper

Exploration = Literal['jitter', 'argmax', 'sample', 'dropout']
Overflow = Literal['drop', 'least_probable', 'retry']


@paper('Switch Transformers: Scaling to Trillion Parameter Models', '2101.03961', draws=True,
       example=dict(capacity_factor=1., eval_capacity_factor=None))
def switch(capacity_factor: float = 1.25, eval_capacity_factor: float | None = 2., exploration: Exploration = 'jitter',
           overflow: Overflow = 'drop') -> dict[str, Any]:
  """Switch Transformers (arXiv 2101.03961).

  Equations 1-2 with k = 1: the best expert's output times its softmax probability, not renormalised, so that the router
  has a gradient. Equation 3: capacity in order of position. Equations 4-6: balance loss, alpha = 0.01. Capacity by the
  formula of Mesh TensorFlow, which the paper used; kernel N(0, 0.02) as in flaxformer.

  `exploration`, appendix C: input 'jitter' of 1e-2; plain 'argmax'; 'sample' from the softmax; input 'dropout' of 0.1.
  `overflow`: tokens beyond an expert's capacity are dropped, the last ones ('drop') or the least probable
  ('least_probable': switch_max of Mesh TensorFlow), or fall back on the next best of 4 experts ('retry': appendix B,
  no-token-left-behind), which excludes sampling.
  """
  if exploration == 'sample' and overflow == 'retry':
    raise ValueError("switch: overflow='retry' needs a ranking of experts, which exploration='sample' does not have. "
                     'Change one of them.')
  place = dict(name='retry' if overflow == 'retry' else 'capacity', capacity_factor=capacity_factor,
               eval_capacity_factor=eval_capacity_factor, convention='mesh_tensorflow')
  select = dict(name='ranked', alternatives=3) if overflow == 'retry' else dict(name='top_k', k=1)
  return dict(
      score=dict(name='linear', init_std=0.02, jitter=0.01 * (exploration == 'jitter'),
                 dropout=0.1 * (exploration == 'dropout')),
      select=dict(name='sample', k=1) if exploration == 'sample' else select,
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=place | (dict(priority='probability') if overflow == 'least_probable' else {}),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
