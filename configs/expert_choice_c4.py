"""Expert Choice in the encoder of a T5 at t5x's base and large sizes on C4.

Paper: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368); 64 experts every other
  layer, capacity factor 1, as in t5x's gin files. Expert choice depends on later tokens, so the decoder uses top-2,
  as in the paper.
Data: as for configs/switch_c4.py.
Command: python -m moejax.train --config=configs/expert_choice_c4.py:base --workdir=runs/expert_choice_base
Cost: pods. Not run here; built and traced at full size by the tests.
Differs: groups are those of configs/switch_c4.py, 4096 tokens of the encoder and 912 of the decoder, whereas t5x starts
  from 4096 and makes more groups until they divide over the devices.
Expected: twice as fast to a given loss as top-2 with capacity (paper, figure 2).
"""
from configs import switch_c4
from moejax.routing import papers

VARIANTS = ('base', 'large')


def get_config(variant='base'):
  config = switch_c4.get_config(variant)
  for side in (config.model.encoder, config.model.decoder):
    side.moe.num_experts = 64
  config.model.encoder.moe.router = papers.expert_choice(capacity_factor=1.)
  config.model.decoder.moe.router = papers.gshard(second='all', capacity_factor=1.)
  config.model.routing_leak = 'slots'
  return config
