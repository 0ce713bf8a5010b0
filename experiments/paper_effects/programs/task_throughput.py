"""Bytes a second of one task: of a model that routes by task, or of the dense model extracted from it for that task.

Checks that both say the same; writes `bytes_per_second`, of the fastest of five rounds.
"""
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import task_moe_domains
from experiments.paper_effects.programs import command
from moejax import models
from moejax.surgery.extract_task import extract_task

VARIANTS = ('full', 'extracted')
TASK, ROUNDS, BATCHES = 1, 5, 4


def measure(variant: str, seed: int) -> dict[str, float]:
  """Times the shipped model, untrained."""
  config = task_moe_domains.get_config().model.to_dict()
  full = models.build(config), *jax.jit(models.build(config).init)(jax.random.key(seed))
  dense_config, *dense = extract_task(config, *full[1:], TASK)
  tokens = jax.random.randint(jax.random.key(seed), (16, 128), 0, 256)
  batch = dict(tokens=tokens, tasks=jnp.full_like(tokens, TASK))
  logits = {}
  for name, (model, *variables) in dict(full=full, extracted=(models.build(dense_config), *dense)).items():
    apply = jax.jit(lambda params, state, model=model: model.apply(params, state, batch).logits)
    logits[name] = np.asarray(apply(*variables))
    if name == variant:
      seconds = []
      for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(BATCHES):
          jax.block_until_ready(apply(*variables))
        seconds.append(time.perf_counter() - start)
  np.testing.assert_allclose(logits['full'], logits['extracted'], rtol=1e-3, atol=1e-4)
  return dict(bytes_per_second=BATCHES * tokens.size / min(seconds))


if __name__ == '__main__':
  command.main(measure, VARIANTS)
