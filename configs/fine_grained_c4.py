"""A 16 B decoder with many small experts, as in DeepSeekMoE 16B: 6 of 64 routed experts per token, and 2 shared ones.

Paper: Dai et al. 2024, "DeepSeekMoE" (arXiv 2401.06066), section 5.1 and table 7 for sizes and training; the first
  layer is dense, and 10944 wide as in its released checkpoint. The 2 shared experts are one of twice the width: the
  same function. The learning rate falls on a cosine instead of in two steps.
Data: TFDS `c4/en`, prepared with file_format='array_record', and the checkpoint's tokenizer.json:
  --config.data.tokenizer.path=.../tokenizer.json
Command: python -m moejax.train --config=configs/fine_grained_c4.py:16b --workdir=runs/fine_grained_16b
Cost: pods; python -m moejax.plan estimates memory and time. Not run here; built and traced at full size by the
  tests.
Expected: 16.4 B parameters, 2.8 B active (paper, section 5.1).
"""
from moejax.routing import papers
from moejax.training.setup import default_config

VARIANTS = ('16b',)


def get_config(variant='16b'):
  if variant not in VARIANTS:
    raise ValueError(f'configs/fine_grained_c4.py:{variant} does not exist; there is :16b.')
  config = default_config()
  router = papers.top_k_dropless(k=6)
  # Weights are normalised over all experts, not over the 6 chosen ones.
  router['weigh'] = dict(name='softmax', order='before', renormalize='never')
  router['balance'] = dict(switch=dict(coefficient=0.001))
  expert = dict(name='feed_forward', hidden=1408, activation='swiglu')
  config.model = dict(
      name='decoder', vocab_size=102400, dim=2048, num_layers=28, attention=dict(heads=16, head_dim=128),
      feed_forward=dict(hidden=10944, activation='swiglu'), sparse=dict(name='top', n=27),
      stacking='scan', remat='full', dtype='bfloat16',
      moe=dict(num_experts=64, experts=expert, shared={**expert, 'hidden': 2816}, router=router,
               dispatch=dict(name='grouped'), group='sequence'))
  config.objective = dict(name='language_model', router_losses='sum')
  config.data = dict(
      name='language_model', source=dict(name='tfds', dataset='c4/en', fields=dict(text='text'),
                                         partitions=dict(train='train', test='validation')),
      tokenizer=dict(name='huggingface', path='tokenizer.json', vocab_size=102400,
                     end_token='<｜end▁of▁sentence｜>', start_token='<｜begin▁of▁sentence｜>'),
      length=4096, batch_size=4608)
  config.optimizer = dict(name='adamw', b2=0.95, weight_decay=0.1, clip=1.0,
                          schedule=dict(name='cosine', peak=4.2e-4, end=4.2e-5, warmup=2000))
  config.training.update(steps=106_449, log_every=100)
  config.evaluation = dict(every=5000, evaluators=dict(valid=dict(name='language_model', split='test')))
  config.checkpoint.every = 5000
  # Parameters and optimizer state take 200 GB, so they are sharded over all devices.
  config.mesh = dict(data=1, fsdp=-1, expert=8, model=1)
  return config
