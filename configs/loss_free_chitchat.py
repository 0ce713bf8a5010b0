"""Auxiliary-loss-free balancing on dialogues: a bias on the selection that is stepped against the load.

Paper: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664); sigmoid
  gates, here renormalised over the two experts chosen.
Command: python -m moejax.train --config=configs/loss_free_chitchat.py --workdir=runs/loss_free_chitchat
Cost: about three minutes on 2 CPU cores.
Expected: loads as even as with a balance loss, without one; not measured.
"""
from configs import mixtral_chitchat
from moejax.routing import papers


def get_config():
  config = mixtral_chitchat.get_config()
  config.model.moe.router = papers.loss_free(k=2)
  config.model.moe.router.weigh.renormalize = 'before'
  return config
