"""Tries or trains the mutants whose numbers come in, one a line, and says what came of each as a line of JSON."""
import dataclasses
import gc
import json
import os
import sys


def main(seed: int, what: str) -> None:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what the code under test prints is no answer
  import jax
  from tests.fuzz import mutants, trial
  jax.config.update('jax_num_cpu_devices', 8)
  jax.devices()
  if what == 'attempt':
    trial.limit_memory()
  print('ready', file=answers, flush=True)
  for count, line in enumerate(sys.stdin):
    number = int(line)
    mutant = mutants.draw(number, seed)
    try:
      config = mutant.build()
    except Exception as error:  # a second change that the first left no place for
      outcome = trial.Outcome('skipped', 0., repr(error))
    else:
      outcome = getattr(trial, what)(config)
    said = dict(number=number, config=mutant.config, changes=mutant.changes, kinds=mutant.kinds,
                **dataclasses.asdict(outcome))
    print(json.dumps(said), file=answers, flush=True)
    if count % 50 == 49:
      jax.clear_caches()
      gc.collect()


if __name__ == '__main__':
  main(int(sys.argv[1]), sys.argv[2])
