"""Sparsely-gated MoE: noisy top-k gating with learned noise."""
from typing import Any

from moejax.routing.papers import paper


@paper('Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer', '1701.06538', draws=True,
       example=dict(k=2), alone=dict(k=1))
def sparsely_gated(k: int = 4, importance: float = 0.1, load: float = 0.1, noise_floor: float = 1e-2) -> dict[str, Any]:
  """Outrageously Large Neural Networks (arXiv 1701.06538).

  Section 2.1, equations 3-5: normal noise times softplus(x W_noise) on the logits in training; softmax over the k best
  only. Section 4 and appendix A: importance and load losses (equations 6-11), both with coefficient 0.1 as for the
  language models; both kernels are initialised to zero. No capacity. Appendix C.1: k = 4. `noise_floor` is from
  Tensor2Tensor, which uses 0.01 for both losses; 0 is the paper's formula.
  """
  return dict(
      score=dict(name='noisy_linear', init_std=0., noise_floor=noise_floor),
      select=dict(name='top_k', k=k),
      weigh=dict(name='softmax', order='after', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(gate_importance=importance, smooth_load=load))
