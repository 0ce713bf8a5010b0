"""Soft MoE at its paper's scale: S/16 to H/14 on ImageNet-21k.

Paper: Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts" (arXiv 2308.00951), section 3; as in
  google-research/vmoe's configs 128 experts (256 with patches of 14 pixels) with one slot each in the second half of
  the layers, query-key norm, mean pooling, reciprocal square-root schedule with cooldown. Unlike here, those have a
  weight decay of 0.03, and 3 on the head (here 0.1), and xavier-uniform kernels of feed-forwards. The paper trains on
  JFT-4B, which is not public.
Data: a TFDS data set `imagenet21k` with `image` and `label`, prepared with file_format='array_record'; TFDS's public
  catalogue does not hold it, so build it from the images (tfds build, or an image folder).
Command: python -m moejax.train --config=configs/soft_moe_imagenet21k.py:B/16 --workdir=runs/soft_moe_b16
Cost: hundreds of accelerator-days. Not run here; built and traced at full size by the tests.
Expected: Soft MoE-B/16 close to ViT-H/14 at 5.7 times less time per step (paper, table 1).
"""
from configs import vmoe_imagenet21k
from moejax.routing import papers

VARIANTS = ('S/16', 'S/14', 'B/16', 'L/16', 'H/14')
SPARSE_LAYERS = {'S': 6, 'B': 6, 'L': 12, 'H': 16}


def get_config(variant='S/16'):
  size, patch = variant.split('/')
  config = vmoe_imagenet21k.get_config(f'{variant},top-{SPARSE_LAYERS[size]}')
  if size == 'S':  # 12 narrow layers here, 8 wider ones in V-MoE
    config.model.update(num_layers=12, dim=384)
    config.model.attention.heads = 6
    config.model.feed_forward.hidden = config.model.moe.experts.hidden = 1536
  config.model.attention.qk_norm = dict(name='layer_norm', use_bias=False)
  config.model.moe = dict(num_experts=256 if patch == '14' else 128, experts=config.model.moe.experts,
                          router=papers.soft_moe(slots=1), dispatch=dict(name='einsum'), group='sequence')
  config.optimizer = dict(name='adamw', b2=0.999, weight_decay=0.1, clip=1.0,
                          schedule=dict(name='rsqrt', peak=1e-3, warmup=10_000, cooldown=50_000))
  return config
