"""The dense baseline of the sparse vision transformers on digits.

Paper: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv 2010.11929).
Command: python -m moejax.train --config=configs/vit_digits.py --workdir=runs/vit_digits
Cost: about a minute on 2 CPU cores.
Result: experiments/digits/results.json, and the table in README.md.
"""
from configs import vmoe_digits


def get_config():
  config = vmoe_digits.get_config()
  config.model.sparse = dict(name='none')
  del config.model['moe']
  return config
