"""Mixtral 8x7B at its full size on C4.

Paper: Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088), table 1 for sizes; its data, batch and learning rate
  are not published, so these are LLaMA's (arXiv 2302.13971) and C4.
  The balance loss is per sequence, not over the batch, which avoids sums over all devices.
Data: TFDS `c4/en`, prepared with file_format='array_record', and Mixtral's SentencePiece model:
  --config.data.tokenizer.path=.../tokenizer.model
Command: python -m moejax.train --config=configs/mixtral_c4.py:8x7b --workdir=runs/mixtral_8x7b
Cost: pods; python -m moejax.plan estimates memory and time. Not run here; built and traced at full size by the
  tests.
Expected: 46.7 B parameters, 12.9 B active (paper, section 1).
"""
from moejax.routing import papers
from moejax.training.setup import default_config

VARIANTS = ('8x7b',)


def get_config(variant='8x7b'):
  if variant not in VARIANTS:
    raise ValueError(f'configs/mixtral_c4.py:{variant} does not exist; there is :8x7b.')
  config = default_config()
  config.model = dict(
      name='decoder', vocab_size=32000, dim=4096, num_layers=32,
      attention=dict(heads=32, kv_heads=8, head_dim=128), positions=dict(name='rope', theta=1e6),
      feed_forward=dict(hidden=14336, activation='swiglu'), sparse=dict(name='every', n=1),
      stacking='scan', remat='full', dtype='bfloat16',
      moe=dict(num_experts=8, experts=dict(name='feed_forward', hidden=14336, activation='swiglu'),
               router=papers.top_k_dropless(k=2), dispatch=dict(name='grouped'), group='sequence'))
  config.objective = dict(name='language_model', router_losses='mean')
  config.data = dict(
      name='language_model', source=dict(name='tfds', dataset='c4/en', fields=dict(text='text'),
                                         partitions=dict(train='train', test='validation')),
      tokenizer=dict(name='sentencepiece', path='tokenizer.model', vocab_size=32000), length=4096, batch_size=1024)
  config.optimizer = dict(name='adamw', b2=0.95, weight_decay=0.1, clip=1.0,
                          schedule=dict(name='cosine', peak=3e-4, end=3e-5, warmup=2000))
  config.training.update(steps=250_000, log_every=100)
  config.evaluation = dict(every=10_000, evaluators=dict(valid=dict(name='language_model', split='test')))
  config.checkpoint.every = 10_000
  # Parameters and optimizer state take 560 GB, so they are sharded over all devices.
  config.mesh = dict(data=1, fsdp=-1, expert=8, model=1)
  return config
