"""How often two held-out bytes have the same first expert in the last layer: neighbours, or any two of a batch."""
import itertools

import jax
import numpy as np

from configs import mixtral_chitchat
from experiments.paper_effects.programs import command, training

VARIANTS = ('neighbours', 'any two')


def measure(variant: str, seed: int) -> dict[str, float]:
  config = mixtral_chitchat.get_config()
  training.shrink(config, steps=300)
  built, state = training.trained(config, seed)
  route = jax.jit(lambda batch: built.model.apply(state.params, state.router_state, batch).routers)
  shares = []
  for batch in itertools.islice(built.pipeline.evaluate('test'), 20):
    routers = route(batch)
    segment = np.asarray(batch['segments'])
    expert = np.asarray(routers[max(routers)].plan.expert[..., 0]).reshape(segment.shape)
    if variant == 'neighbours':
      both = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
      shares.append(np.mean((expert[:, 1:] == expert[:, :-1])[both]))
    else:
      load = np.bincount(expert[segment > 0]) / np.sum(segment > 0)
      shares.append(np.sum(load**2))
  return dict(same=np.mean(shares))


if __name__ == '__main__':
  command.main(measure, VARIANTS)
