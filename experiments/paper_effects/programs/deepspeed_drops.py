"""How often bytes of the first and of the last quarter of a sequence are dropped by a PR-MoE with half the slots.

Its routers are those at the start of training, its sequences real; what is counted are first choices in training.
"""
import jax
import numpy as np

from configs import deepspeed_pr_moe_chitchat
from experiments.paper_effects.programs import command
from moejax.training import setup, step

VARIANTS = ('by position', 'random')
BATCHES = 8


def measure(variant: str, seed: int) -> dict[str, float]:
  config = deepspeed_pr_moe_chitchat.get_config()
  config.seed = seed
  place = config.model.moe.router.place
  place.capacity_factor = 0.5
  place.priority = 'position' if variant == 'by position' else 'random'
  built = setup.prepare(config)
  state = step.init_state(built)

  @jax.jit
  def kept(params, router_state, batch, key):
    routers = built.model.apply(params, router_state, batch, key=key, train=True).routers
    return {name: router.plan.kept[..., 0].mean(0) for name, router in routers.items()}

  batches, total = built.pipeline.train(seed), []
  for number in range(BATCHES):
    shares = kept(state.params, state.router_state, built.place(next(batches)), jax.random.key(number))
    total.append(1 - np.mean(list(jax.device_get(shares).values()), axis=0))
  dropped = np.mean(total, axis=0)  # by position
  quarter = len(dropped) // 4
  first, last = dropped[:quarter].mean(), dropped[-quarter:].mean()
  return dict(first_quarter=first, last_quarter=last, last_minus_first=last - first)


if __name__ == '__main__':
  command.main(measure, VARIANTS)
