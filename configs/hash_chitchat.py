"""Hash layers on dialogues, at the active compute of configs/dense_chitchat.py: the expert is a hash of the byte.

Paper: Roller et al. 2021, "Hash Layers For Large Sparse Models" (arXiv 2106.04426): nothing to learn, nothing to balance.
Command: python -m moejax.train --config=configs/hash_chitchat.py --workdir=runs/hash_chitchat
Cost: about three minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
"""
from configs import switch_chitchat
from moejax.routing import papers


def get_config():
  config = switch_chitchat.get_config()
  config.model.moe.router = papers.hash_layers(vocab_size=config.model.vocab_size)
  config.model.moe.dispatch.name = 'grouped'
  config.model.moe.group = 'batch'
  config.model.moe.experts.init_scale = 1.0
  return config
