"""Switch Transformers at their paper's scale: Base, Large, XXL and C on C4.

Paper: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), table 9 for sizes; capacity and an
  initialisation scale of 0.1 for attention, feed-forwards and experts as in t5x's gin files: 128 experts every other
  layer (C: 2048 experts in every layer). There the head has a scale of 0.1 too, here 1, and Switch-Base ties it to the
  embedding table.
Data: TFDS `c4/en`, prepared with file_format='array_record', and T5's SentencePiece model:
  --config.data.tokenizer.path=.../cc_all.32000/sentencepiece.model
Command: python -m moejax.train --config=configs/switch_c4.py:base --workdir=runs/switch_base
Cost: pods. Not run here; built and traced at full size by the tests.
Differs: a group is the tokens of one of 256 chips (C: 512), 4096 of the encoder and 912 of the decoder (C: 2048 and
  456), whereas t5x starts from 8192 (C: 2048) and makes more groups until they divide over the devices. Here the sizes
  do not depend on the mesh; on fewer chips both may be increased.
Expected: Switch-Base with 64 experts reaches T5-Base's loss in a seventh of the steps (paper, figure 5).
"""
from moejax.routing import papers
from moejax.training.setup import default_config

VARIANTS = ('base', 'large', 'xxl', 'c')
# layers per side, width, feed-forward, heads, activation, experts, one in n sparse, sequences per group, capacity
# factor. Whole sequences as groups divide over as many devices as there are groups.
SIZES = {
    'base': (12, 768, 3072, 12, 'relu', 128, 2, 8, 1.25),
    'large': (24, 1024, 4096, 16, 'relu', 128, 2, 8, 1.25),
    'xxl': (24, 4096, 10240, 64, 'geglu', 128, 2, 8, 1.25),
    'c': (15, 2080, 6144, 32, 'relu', 2048, 1, 4, 1.0),
}
INPUTS, TARGETS = 512, 114  # tokens per example


def get_config(variant='base'):
  layers, dim, hidden, heads, activation, num_experts, n, sequences, capacity_factor = SIZES[variant]
  config = default_config()
  side = lambda length: dict(
      num_layers=layers, attention=dict(heads=heads, head_dim=64, scale='none', init=dict(name='fan_in', scale=0.1)),
      feed_forward=dict(hidden=hidden, activation=activation, init_scale=0.1), sparse=dict(name='every', n=n),
      stacking='scan', remat='full',
      moe=dict(num_experts=num_experts,
               experts=dict(name='feed_forward', hidden=hidden, activation=activation, init_scale=0.1),
               router=papers.switch(capacity_factor=capacity_factor), dispatch=dict(name='einsum'),
               group=sequences * length))
  config.model = dict(name='encoder_decoder', vocab_size=32128, dim=dim, encoder=side(INPUTS), decoder=side(TARGETS),
                      dtype='bfloat16')
  config.objective = dict(name='seq2seq', z_loss=1e-4, router_losses='mean')
  config.data = dict(
      name='span_corruption', source=dict(name='tfds', dataset='c4/en', fields=dict(text='text'),
                                          partitions=dict(train='train', test='validation')),
      tokenizer=dict(name='sentencepiece', path='cc_all.32000/sentencepiece.model', vocab_size=32000),
      length=INPUTS, batch_size=2048)
  # Adafactor scales by the size of parameters; the schedule is 1/sqrt(step), 0.01 up to step 10,000.
  config.optimizer = dict(name='adafactor', clip=None, schedule=dict(name='rsqrt', peak=0.01, warmup=10_000))
  config.training.update(steps=524_288, log_every=100)
  config.evaluation = dict(every=10_000, evaluators=dict(valid=dict(name='seq2seq', split='test')))
  config.checkpoint.every = 10_000
  return config
