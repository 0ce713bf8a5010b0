"""LIMoE: one sparse tower for images and text, with losses that keep experts for both."""
from typing import Any

from moejax.routing.papers import paper


@paper('Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts', '2206.02770', draws=True,
       example=dict(capacity_factor=0.6, image_experts=3., text_experts=2.),
       alone=dict(image_experts=1., text_experts=1.))
def limoe(capacity_factor: float = 1.05, eval_capacity_factor: float | None = None, image_experts: float = 20.,
          text_experts: float = 9.) -> dict[str, Any]:
  """Multimodal Contrastive Learning with LIMoE (arXiv 2206.02770).

  V-MoE's router with k = 1 and Batch Prioritized Routing, over the tokens of both modalities in one group. Classic
  losses (importance, load, z) and entropy losses by modality: local for text only, global for both with thresholds
  log `image_experts` and log `text_experts`, for the paper's 32 experts. The paper's code is not public; the numbers of
  experts and the coefficients are second-hand.
  """
  return dict(
      score=dict(name='linear', init_std='1/sqrt(D)', noise_std='1/E'),
      select=dict(name='top_k', k=1),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
                 convention='vmoe', priority='batch'),
      balance=dict(importance=0.005, load=0.005, z=0.001, local_entropy=dict(coefficient=0.04, modalities=('text',)),
                   global_entropy=dict(coefficient=0.04, image_experts=image_experts, text_experts=text_experts)))
