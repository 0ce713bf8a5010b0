"""DeepSpeed-MoE: top-1 or top-2 with random token selection."""
from typing import Any, Literal

from moejax.routing.papers import paper

Noise = Literal['none', 'jitter', 'rsample']


@paper('DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training', '2201.05596', draws=True,
       example=dict(min_capacity=0), alone=dict(k=1))
def deepspeed(k: int = 1, capacity_factor: float = 1., eval_capacity_factor: float | None = None,
              noise: Noise = 'none', random_token_selection: bool = True, min_capacity: int = 4) -> dict[str, Any]:
  """DeepSpeed-MoE (arXiv 2201.05596), as in deepspeed/moe/sharded_moe.py.

  k = 1: softmax of the best expert, not renormalised; Random Token Selection: an expert over capacity keeps random
  tokens (in training; in the code at evaluation too). Without it, the first tokens are kept; the code keeps whichever
  of equal values `torch.topk` returns. `noise`: 'jitter' multiplies the router's input by U(0.99, 1.01); 'rsample'
  samples the expert from the softmax and keeps its probability as the weight. k = 2: the second expert is sampled from
  the softmax without the first, at evaluation too; by position, with weights renormalised over the kept choices. k > 2:
  most probable choices first, the code's policy 'probs'; its 'position' is `priority='position', order='token'`.
  Capacity at least 4; balance loss 0.01.

  For k > 2 the code ranked logits until its commit 853c938 of April 2026, with 0 for tokens that did not choose the
  expert, so choices with negative logits were dropped although their expert had room. It now ranks probabilities, as
  here.

  For the layer: `moe.shared` with `shared_gate` (residual MoE), and a list for `moe.num_experts` (pyramid).
  """
  select = {1: dict(name='sample' if noise == 'rsample' else 'top_k', k=1),
            2: dict(name='gshard_top_2', second='sampling', eval_second='sampling')}.get(k, dict(name='top_k', k=k))
  priority = {1: 'random' if random_token_selection else 'position', 2: 'position'}.get(k, 'probability')
  return dict(
      score=dict(name='linear', init_std='torch_linear', jitter=0.01 if noise == 'jitter' else 0.),
      select=select,
      weigh=dict(name='softmax', order='before', renormalize='never' if k == 1 else 'after'),
      place=dict(name='capacity', capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
                 convention='deepspeed', min_capacity=min_capacity, priority=priority),
      balance=dict(switch=dict(coefficient=0.01, convention='deepspeed')))
