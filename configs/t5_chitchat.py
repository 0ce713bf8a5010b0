"""A dense T5 1.1 on dialogues: spans of bytes are masked, and the decoder predicts them.

Paper: Raffel et al. 2020 (arXiv 1910.10683), version 1.1: relative positions, RMSNorm, gated GELU, untied head.
Command: python -m moejax.train --config=configs/t5_chitchat.py --workdir=runs/t5_chitchat
Cost: about two minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
"""
from moejax.training.setup import default_config


def get_config():
  config = default_config()
  side = dict(num_layers=2, attention=dict(heads=4, scale='none'), feed_forward=dict(hidden=256, activation='geglu'))
  config.model = dict(name='encoder_decoder', vocab_size=384, dim=128, encoder=side, decoder=side)
  config.objective = dict(name='seq2seq')
  config.data = dict(name='span_corruption', source=dict(name='chitchat', test_fraction=0.02), tokenizer=dict(name='bytes'),
                     length=128, batch_size=16)
  config.optimizer = dict(name='adamw', b2=0.98, weight_decay=0.1, clip=1.0,
                          schedule=dict(name='cosine', peak=3e-3, end=3e-4, warmup=50))
  config.training.update(steps=300, log_every=20)
  config.evaluation = dict(every=100, evaluators=dict(test=dict(name='seq2seq', split='test')))
  config.checkpoint.every = 100
  return config
