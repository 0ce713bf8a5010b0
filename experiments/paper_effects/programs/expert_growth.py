"""How the time of a mixture of FastMoE's gate grows with its experts, computed one after another or grouped.

Writes `growth`, the time of 64 experts over that of 4, each of the fastest of five rounds.
"""
import time

import jax
import jax.numpy as jnp

from experiments.paper_effects.programs import command
from moejax import functional
from moejax.config import call
from moejax.layers.feed_forwards.moe import MoE
from moejax.random import derive
from moejax.routing import papers

TOKENS, DIM, HIDDEN, ROUNDS = 1024, 64, 128, 5


def seconds(dispatch: str, num_experts: int, seed: int) -> float:
  """Of one layer, forward and backward."""
  config = dict(num_experts=num_experts, experts=dict(name='feed_forward', hidden=HIDDEN), group='batch',
                router=papers.fastmoe(gate='naive'), dispatch=dict(name=dispatch))
  layer = functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=DIM, dtype=jnp.float32, rngs=rngs), MoE.mix)
  key = jax.random.key(seed)
  params, state = layer.init(derive(key, 'init'))
  x = jax.random.normal(derive(key, 'tokens'), (1, TOKENS, DIM))
  step = jax.jit(jax.grad(lambda params: (layer.apply(params, state, x)[0]**2).sum()))
  jax.block_until_ready(step(params))
  times = []
  for _ in range(ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready(step(params))
    times.append(time.perf_counter() - start)
  return min(times)


def measure(dispatch: str, seed: int) -> dict[str, float]:
  few, many = (seconds(dispatch, number, seed) for number in (4, 64))
  return dict(growth=many / few, few=few, many=many)


if __name__ == '__main__':
  command.main(measure, ('reference', 'grouped'))
