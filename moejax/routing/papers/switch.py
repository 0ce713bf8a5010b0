"""Switch Transformer: one expert a token."""
from typing import Any, Literal

from moejax.routing.papers import paper

Exploration = Literal['jitter', 'argmax', 'sample', 'dropout']
Overflow = Literal['drop', 'least_probable', 'retry']


@paper('Switch Transformers: Scaling to Trillion Parameter Models', '2101.03961', draws=True,
       example=dict(capacity_factor=1., eval_capacity_factor=None))
def switch(capacity_factor: float = 1.25, eval_capacity_factor: float | None = 2., exploration: Exploration = 'jitter',
           overflow: Overflow = 'drop') -> dict[str, Any]:
  """Switch Transformers (arXiv 2101.03961).

  Equations 1-2 with k = 1: the output is the softmax probability times that of the best expert, not renormalised, so
  that the router has a gradient. Equation 3: capacity in the order of positions. Equations 4-6: balance loss, alpha =
  0.01. Capacity by the formula of Mesh TensorFlow, where the paper's runs were; kernel N(0, 0.02) of flaxformer.

  `exploration`, appendix C: input 'jitter' of 1e-2; 'argmax' alone; 'sample' of the softmax; input 'dropout' of 0.1.
  `overflow`: what is beyond an expert's capacity goes nowhere, by position ('drop') or by probability
  ('least_probable': switch_max of Mesh TensorFlow), or on to the next best of 4 experts ('retry': appendix B,
  no-token-left-behind), which has no next best where the expert is sampled.
  """
  if exploration == 'sample' and overflow == 'retry':
    raise ValueError("switch: overflow='retry' goes down a token's ranking of experts, which exploration='sample' does "
                     'not make. Choose another of either.')
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
