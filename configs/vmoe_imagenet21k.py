"""V-MoE at its paper's scale: S/32 to H/14 on ImageNet-21k.

Paper: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974), table 8 for sizes: 32
  experts, 2 per patch, groups of 8 images. Sigmoid loss, Adam, clipping at 1, learning rates by size and router losses
  summed over layers are those of google-research/vmoe's released config. Unlike here, that has 8 experts, a class token
  (pool='token', and hence groups of 8*(N+1)), RandAugment and mixup, xavier-uniform kernels of feed-forwards, and for
  S/32 a tanh layer before the head.
  The argument is `size/patch` and then the sparse layers: `B/16,every-2`, `H/14,last-5`;
  `15B` is the 48-layer model of section 3.4, whose width 1408 and feed-forward 6400 give its printed 14.7 B parameters.
Data: a TFDS data set `imagenet21k` with `image` and `label`, prepared with file_format='array_record'; TFDS's public
  catalogue does not hold it, so build it from the images (tfds build, or an image folder).
Command: python -m moejax.train --config=configs/vmoe_imagenet21k.py:B/16,every-2 --workdir=runs/vmoe_b16
Cost: S/32 about 30, H/14 thousands of TPUv3-core-days in the paper. Not run here; built and traced at full size by the
  tests.
Expected: V-MoE-B/16 Every-2 matches ViT-L/16 (paper, figure 3).
"""
from moejax.routing import papers
from moejax.training.setup import default_config

# layers, width, feed-forward, heads
SIZES = {'S': (8, 512, 2048, 8), 'B': (12, 768, 3072, 12), 'L': (24, 1024, 4096, 16), 'H': (32, 1280, 5120, 16),
         '15B': (48, 1408, 6400, 16)}
PEAKS = {'S/32': 1e-3, 'B/32': 8e-4, 'B/16': 8e-4, 'L/32': 6e-4, 'L/16': 4e-4, 'H/14': 3e-4}
VARIANTS = ('S/32,last-2', 'B/32,every-2', 'B/16,every-2', 'L/16,every-2', 'H/14,last-5', 'H/14,every-2',
            '15B/14,every-2')


def get_config(variant='S/32,last-2'):
  name, layout = variant.split(',')
  size, patch = name.split('/')
  (layers, dim, hidden, heads), patch = SIZES[size], int(patch)
  layout, n = layout.split('-')
  config = default_config()
  config.model = dict(
      name='vision', image_size=224, patch_size=patch, num_classes=21843, dim=dim, num_layers=layers,
      attention=dict(heads=heads, use_bias=True, init=dict(name='xavier_uniform')),
      feed_forward=dict(hidden=hidden, use_bias=True), head_bias='-log(num_classes)',
      sparse=dict(name=layout, n=int(n)), stacking='scan', remat='full', dtype='bfloat16',
      moe=dict(num_experts=32, experts=dict(name='feed_forward', hidden=hidden, use_bias=True, init='identical'),
               router=papers.vmoe(k=2, priority='position'), dispatch=dict(name='einsum'),
               group=8 * (224 // patch)**2))
  config.objective = dict(name='classification', loss='sigmoid', router_losses='sum')
  config.data = dict(
      name='images', image_size=224, channels=3, batch_size=4096, crop='inception', multi_label=True,
      augment=(dict(name='flip'),),
      source=dict(name='tfds', dataset='imagenet21k', num_classes=21843, fields=dict(image='image', label='label'),
                  partitions=dict(train='train', test='validation')))
  config.optimizer = dict(name='adamw', weight_decay=0.1, clip=1.0,
                          schedule=dict(name='linear', peak=PEAKS.get(name, 3e-4), warmup=10_000, end=1e-5))
  config.training.update(steps=300_000, log_every=100)
  config.evaluation = dict(every=10_000, evaluators=dict(valid=dict(name='accuracy', split='test')))
  config.checkpoint.every = 10_000
  return config
