"""How far experts above a learned threshold are from the equal share that training gave them.

Writes `imbalance`: the mean over experts of |tokens taken / equal share - 1| on held-out batches.
"""
import itertools

import jax
import numpy as np

from configs import strictly_balanced_chitchat
from experiments.paper_effects.programs import command, training
from moejax.models import sequences

COEFFICIENTS = {'loss 0': 0., 'loss 1': 1.}


def measure(variant: str, seed: int) -> dict[str, float]:
  config = strictly_balanced_chitchat.get_config()
  training.shrink(config, steps=200)
  config.model.moe.router.balance.threshold = COEFFICIENTS[variant]
  built, state = training.trained(config, seed)

  @jax.jit
  def taken(batch):
    [router] = built.model.apply(state.params, state.router_state, batch).routers.values()
    return (router.plan.shares() > 0).sum((0, 1)), sequences.read(batch).router_inputs.valid.sum()

  counts, tokens = map(sum, zip(*(taken(batch) for batch in itertools.islice(built.pipeline.evaluate('test'), 20))))
  share = config.model.moe.router.select.experts_per_token / config.model.moe.num_experts
  return dict(imbalance=np.mean(np.abs(np.asarray(counts) / (tokens * share) - 1)))


if __name__ == '__main__':
  command.main(measure, COEFFICIENTS)
