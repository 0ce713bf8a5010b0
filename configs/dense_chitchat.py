"""The dense baseline of the sparse decoders on dialogues: a byte-level language model.

Paper: the decoder of LLaMA (arXiv 2302.13971): rotary positions, RMSNorm, SwiGLU.
Data: 12.6 million characters of human dialogue, a package that `pip install 'moejax[data]'` installs.
Command: python -m moejax.train --config=configs/dense_chitchat.py --workdir=runs/dense_chitchat
Cost: about two minutes on 2 CPU cores.
Result: experiments/chitchat/results.json, and the table in README.md.
"""
from moejax.training.setup import default_config


def get_config():
  config = default_config()
  config.model = dict(
      name='decoder', vocab_size=258, dim=128, num_layers=2, attention=dict(heads=4),
      feed_forward=dict(hidden=384, activation='swiglu'))
  config.objective = dict(name='language_model')
  config.data = dict(name='language_model', source=dict(name='chitchat', test_fraction=0.02), tokenizer=dict(name='bytes'),
                     length=128, batch_size=16)
  config.optimizer = dict(name='adamw', b2=0.98, weight_decay=0.1, clip=1.0,
                          schedule=dict(name='cosine', peak=3e-3, end=3e-4, warmup=50))
  config.training.update(steps=300, log_every=20)
  config.evaluation = dict(every=100, evaluators=dict(test=dict(name='language_model', split='test')))
  config.checkpoint.every = 100
  return config
