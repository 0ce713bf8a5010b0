"""Switch Transformer as a decoder on dialogues, at the active compute of configs/dense_chitchat.py.

Paper: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961): one of 8 experts for each byte in each layer;
  capacity is given out by position, so that no byte depends on a later one.
Command: python -m moejax.train --config=configs/switch_chitchat.py --workdir=runs/switch_chitchat
Cost: about three minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
"""
from configs import dense_chitchat
from moejax.routing import papers


def get_config():
  config = dense_chitchat.get_config()
  config.model.sparse = dict(name='every', n=1)
  config.model.moe = dict(
      num_experts=8, experts=dict(name='feed_forward', hidden=384, activation='swiglu', init_scale=0.1),
      router=papers.switch(), dispatch=dict(name='gather'), group='sequence')
  return config
