"""Sparsely-gated MoE: noisy top-k gating, with noise of a learned size."""
from typing import Any

from moejax.routing.papers import paper


@paper('Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer', '1701.06538', draws=True,
       example=dict(k=2), alone=dict(k=1))
def sparsely_gated(k: int = 4, importance: float = 0.1, load: float = 0.1, noise_floor: float = 1e-2) -> dict[str, Any]:
  """Outrageously Large Neural Networks (arXiv 1701.06538).

  Section 2.1, equations 3-5: normal noise times softplus(x W_noise) on the logits in training; softmax over the k best
  alone. Section 4 and appendix A: importance and load losses (equations 6-11), both with the weight 0.1 of the language
  models; both kernels start at zero. No capacity. Appendix C.1: k = 4. `noise_floor` is that of Tensor2Tensor, whose
  one coefficient for both losses is 0.01; 0 is the paper's formula.
  """
  return dict(
      score=dict(name='noisy_linear', init_std=0., noise_floor=noise_floor),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(gate_importance=importance, smooth_load=load))
