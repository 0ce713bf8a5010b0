"""GShard: two experts per token, the second sampled."""
from typing import Any

from moejax.routing.papers import paper
from moejax.routing.select.gshard_top_2 import SecondExpert


@paper('GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding', '2006.16668', draws=True,
       alone=None)
def gshard(second: SecondExpert = 'random', capacity_factor: float = 1.,
           eval_capacity_factor: float | None = None) -> dict[str, Any]:
  """GShard (arXiv 2006.16668).

  Algorithm 1: softmax; the best two, with g1 and g2 renormalised to sum to 1 before anything is dropped; the second is
  kept with probability min(1, 2*g2); C = 2S/E slots, all first choices before all second ones. Section 2.2: balance
  loss over first choices, coefficient 0.01. Evaluation always takes both experts (as do lingvo and GLaM in training:
  `second='all'`).
  """
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='gshard_top_2', second=second, threshold=0.5),
      weigh=dict(name='softmax', order='before', renormalize='before'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor),
      balance=dict(switch=dict(coefficient=0.01, convention='gshard')))
