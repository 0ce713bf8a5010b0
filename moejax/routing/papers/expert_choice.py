"""Expert Choice: experts choose tokens."""
from typing import Any

from moejax.routing.papers import paper


@paper('Mixture-of-Experts with Expert Choice Routing', '2202.09368', chooses='expert',
       example=dict(capacity_factor=1.))
def expert_choice(capacity_factor: float = 2.) -> dict[str, Any]:
  """Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368).

  Section 3.2: softmax over experts; every expert takes its C = c*S/E best tokens, weighted by their probability, for
  an average of c = 2 experts per token; no auxiliary loss. Not causal: for encoders.
  """
  return dict(
      score=dict(name='linear', init_std=0.02),
      select=dict(name='expert_choice', capacity_factor=capacity_factor),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='dropless'))
