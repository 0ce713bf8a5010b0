"""V-MoE on Fashion-MNIST: 60,000 real images, for when the digits are too few.

Paper: Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (arXiv 2106.05974).
Data: the four IDX files in a folder; Debian's dataset-fashion-mnist installs them in the default folder;
  `--config.data.source.path=...` sets another.
Command: python -m moejax.train --config=configs/vmoe_fashion_mnist.py --workdir=runs/vmoe_fashion_mnist
Cost: about an hour on 2 CPU cores, minutes on a GPU.
Expected: above 90 % test accuracy; not measured.
"""
from configs import vmoe_digits


def get_config():
  config = vmoe_digits.get_config()
  config.model.update(image_size=28, patch_size=4, dim=128, num_layers=6)
  config.model.attention.heads = 4
  config.model.feed_forward.hidden = 512
  config.model.moe.experts.hidden = 256
  config.model.moe.group = 8 * 49
  config.data.update(source=dict(name='fashion_mnist'), image_size=28,
                     augment=(dict(name='pad_crop', padding=2), dict(name='flip')))
  config.training.steps = 10_000
  config.evaluation.every = 1000
  config.checkpoint.every = 1000
  return config
