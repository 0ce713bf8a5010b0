"""Dropless top-k, as in Mixtral."""
from typing import Any

from moejax.routing.papers import paper


@paper('Mixtral of Experts', '2401.04088', alone=dict(k=1))
def top_k_dropless(k: int = 2, balance: float = 0.02) -> dict[str, Any]:
  """Mixtral of Experts (arXiv 2401.04088), section 2.1; dropless since MegaBlocks (arXiv 2211.15841).

  The weights are a softmax over the logits of the k best experts; every choice is computed. Balance loss as in Hugging
  Face transformers: over all tokens of the batch together, k at uniform routing.
  """
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(switch=dict(coefficient=balance, convention='mixtral')))
