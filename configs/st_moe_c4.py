"""ST-MoE at its paper's scale on C4: Base, and the 32B model of 269 billion parameters.

Paper: Zoph et al. 2022, "ST-MoE" (arXiv 2202.08906), table 11 and appendix; layers and widths as in t5x's gin files:
  every fourth layer sparse, followed by one more dense feed-forward; top-2, router z-loss.
Data: as for configs/switch_c4.py.
Command: python -m moejax.train --config=configs/st_moe_c4.py:32b --workdir=runs/st_moe_32b
Cost: pods. Not run here; built and traced at full size by the tests.
Differs: groups are those of configs/switch_c4.py, 4096 tokens of the encoder and 912 of the decoder, whereas t5x starts
  from 4096 and makes more groups until they divide over the devices.
Expected: no run diverges (paper, table 4).
"""
from configs import switch_c4
from moejax.routing import papers

VARIANTS = ('base', '32b')
# layers per side, width, feed-forward, heads, head width, experts, weight of the router z-loss
SIZES = {'base': (12, 768, 2048, 12, 64, 32, 1e-4), '32b': (24, 5120, 20480, 64, 128, 64, 1e-3)}


def get_config(variant='base'):
  layers, dim, hidden, heads, head_dim, num_experts, z = SIZES[variant]
  config = switch_c4.get_config()
  feed_forward = dict(hidden=hidden, activation='geglu', init_scale=0.1)
  for side in (config.model.encoder, config.model.decoder):
    side.update(num_layers=layers,
                attention=dict(heads=heads, head_dim=head_dim, scale='none', init=dict(name='fan_in', scale=0.1)),
                feed_forward=feed_forward, extra_feed_forward=feed_forward, sparse=dict(name='every', n=4))
    side.moe.update(num_experts=num_experts, experts=dict(name='feed_forward', **feed_forward))
    side.moe.router = papers.st_moe()
    side.moe.router.balance.z = z
  config.model.update(dim=dim, routing_leak='slots')
  return config
