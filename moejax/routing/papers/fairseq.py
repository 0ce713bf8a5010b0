"""fairseq's mixtures of experts: the routing of Artetxe et al. 2021 and NLLB."""
from typing import Any, Literal

from moejax.routing.papers import paper

Second = Literal['all', 'sampling', 'random']


@paper('Efficient Large Scale Language Modeling with Mixtures of Experts', '2112.10684', alone=None,
       example=dict(capacity_factor=0.5))
def fairseq(second: Second = 'all', capacity_factor: float = 1., eval_fraction: float | None = 0.25,
            renormalize: Literal['before', 'after'] = 'after', batch_priority: bool = False) -> dict[str, Any]:
  """Efficient Large Scale Language Modeling with Mixtures of Experts (arXiv 2112.10684), as in fairseq's branch `moe`.

  The best two of the softmax; C = 2*ceil(S/E) slots in training and ceil(0.25*S) at evaluation (`eval_fraction`; None:
  as in training); gates renormalised over the kept choices, so that the only kept one has weight 1
  (`renormalize='before'`: `moe_normalize_gate_prob_before_dropping`). Balance loss over first choices, with 0.01.
  `second`: 'all' in the recipes; 'sampling', the default of the code, draws it from the softmax without the first;
  'random' keeps it with probability min(1, 2*g2), where g2 is p2, or p2/(p1+p2) with `renormalize='before'`.
  """
  gate = 'renormalized' if renormalize == 'before' else 'probability'
  select = (dict(name='thresholded_top_k', k=2, policy='random', threshold=0.5, gate=gate) if second == 'random' else
            dict(name='gshard_top_2', second=second, eval_second=second))
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=select,
      weigh=dict(name='softmax', order='before', renormalize=renormalize),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_fraction,
                 convention='fairseq', priority='batch' if batch_priority else 'position'),
      balance=dict(switch=dict(coefficient=0.01, convention='fairseq')))
