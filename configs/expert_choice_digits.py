"""Expert Choice on handwritten digits, at the active compute of configs/vit_digits.py.

Paper: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368). Experts take twice as many
  patches as would be an equal share (capacity factor 2) and are half as wide as the dense feed-forward.
Command: python -m moejax.train --config=configs/expert_choice_digits.py --workdir=runs/expert_choice_digits
Cost: about two minutes on 2 CPU cores.
Result: experiments/digits/results.json, and the table in README.md.
"""
from configs import vmoe_digits
from moejax.routing import papers


def get_config():
  config = vmoe_digits.get_config()
  config.model.moe.router = papers.expert_choice(capacity_factor=2.)
  config.model.moe.experts.init = 'independent'
  return config
