"""Loss on held-out dialogues of configs/hash_chitchat.py, by what is hashed and by which table."""
import itertools
import statistics

import jax

from configs import hash_chitchat
from experiments.paper_effects.programs import command, training

VARIANTS = ('random', 'positions', 'future')


def measure(variant: str, seed: int) -> dict[str, float]:
  """Mean loss of 40 batches that training does not see."""
  config = hash_chitchat.get_config(variant)
  training.shrink(config, steps=300)
  built, state = training.trained(config, seed)
  loss = jax.jit(lambda batch: built.objective(built.model.apply(state.params, state.router_state, batch), batch)[0])
  batches = itertools.islice(built.pipeline.evaluate('test'), 40)
  return dict(loss=statistics.mean(float(loss(batch)) for batch in batches))


if __name__ == '__main__':
  command.main(measure, VARIANTS)
