"""Soft MoE: slots are mixtures of tokens."""
from typing import Any

from moejax.routing.papers import paper


@paper('From Sparse to Soft Mixtures of Experts', '2308.00951', chooses='soft', example=dict(slots=2))
def soft_moe(slots: int = 1) -> dict[str, Any]:
  """From Sparse to Soft Mixtures of Experts (arXiv 2308.00951).

  Equation 1: dispatch weights are the softmax of the logits over tokens; equation 2: combine weights are their softmax
  over all slots of all experts. Section 2.3: logits from normalised tokens and slot parameters, with a learned scale.
  `slots`: slots per expert (1 in most of the paper's models). Not causal: for encoders.
  """
  return dict(
      score=dict(name='soft_moe', slots=slots),
      select=dict(name='soft'),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='dropless'))
