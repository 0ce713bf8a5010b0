"""THOR: random experts instead of a router, and consistency between two of them."""
from typing import Any, Literal

from moejax.routing.papers import paper


@paper('Taming Sparsely Activated Transformer with Stochastic Experts', '2110.04260', chooses='chance', draws=True,
       exchangeable=False)
def thor(level: Literal['token', 'document'] = 'document', seed: int = 0) -> dict[str, Any]:
  """Taming Sparsely Activated Transformer with Stochastic Experts (arXiv 2110.04260).

  Section 3: in training one expert per layer for the whole batch, drawn uniformly, with weight one; at evaluation one
  per token or document (`level`: 'token' is `inference_level=0` of microsoft/Stochastic-Mixture-of-Experts, 'document'
  its 1, a sentence there), with fixed draws from `seed`. Training adds a consistency loss between two such passes:
  `config.method = dict(name='consistency', alpha=5.0)`.
  """
  return dict(
      features=dict(name='documents'),
      score=dict(name='random', per='batch', eval_per=level, seed=seed),
      select=dict(name='top_k', k=1),
      weigh=dict(name='one'),
      place=dict(name='dropless'))
