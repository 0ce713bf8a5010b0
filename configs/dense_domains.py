"""The dense baseline of the decoders routed by domain: a byte-level language model of three domains.

Paper: the dense baseline of Gururangan et al. 2021, "DEMix Layers" (arXiv 2108.05036): batches balanced over domains.
Data: dialogues, Python's standard library and English prose, installed by `pip install 'moejax[data]'`.
Command: python -m moejax.train --config=configs/dense_domains.py --workdir=runs/dense_domains
Cost: about two minutes on 2 CPU cores.
Result: Expected: the perplexity of dialogue above that of code and prose.
"""
from moejax.data.mixture import DOMAINS
from moejax.training.setup import default_config


def get_config():
  config = default_config()
  config.model = dict(
      name='decoder', vocab_size=258, dim=128, num_layers=2, attention=dict(heads=4),
      feed_forward=dict(hidden=256, activation='gelu'))
  config.objective = dict(name='language_model')
  # Only some 200,000 characters of each domain are held out, to keep evaluation short.
  held_out = dict(code=0.01, dialogue=0.02, prose=0.2)
  sources = {name: dict(source, test_fraction=held_out[name]) for name, source in DOMAINS.items()}
  config.data = dict(name='language_model', source=dict(name='mixture', sources=sources), tokenizer=dict(name='bytes'),
                     length=128, batch_size=24, balance='tasks')
  config.optimizer = dict(name='adamw', b2=0.98, weight_decay=0.1, clip=1.0,
                          schedule=dict(name='cosine', peak=3e-3, end=3e-4, warmup=50))
  config.training.update(steps=300, log_every=20)
  config.evaluation = dict(every=300, evaluators=dict(test=dict(name='domains')))
  config.checkpoint.every = 300
  return config
