"""THOR: no router, and consistency between two random experts."""
from typing import Any, Literal

from moejax.routing.papers import paper


@paper('Taming Sparsely Activated Transformer with Stochastic Experts', '2110.04260', chooses='chance', draws=True,
       exchangeable=False)
def thor(level: Literal['token', 'document'] = 'document', seed: int = 0) -> dict[str, Any]:
  """Taming Sparsely Activated Transformer with Stochastic Experts (arXiv 2110.04260).

  Section 3: in training one expert a layer for the whole batch, drawn uniformly, its output with weight one; at
  evaluation one for every `level` ('token' is `inference_level=0` of microsoft/Stochastic-Mixture-of-Experts,
  'document' its 1, a sentence there), with draws of `seed` that stay. What is learned is the consistency of two such
  passes: `config.method = dict(name='consistency', alpha=5.0)`.
  """
  return dict(
      features=dict(name='documents'),
      score=dict(name='random', per='batch', eval_per=level, seed=seed),
      select=dict(name='top_k', k=1),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
