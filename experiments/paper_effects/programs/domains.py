"""A small language model of three domains of text, dense or with experts by domain.

Both have the same active compute. metrics.jsonl is that of the training run.
"""
import argparse

from configs import demix_domains, dense_domains
from moejax.training.loop import run

VARIANTS = {'dense': dense_domains, 'demix': demix_domains}


def config(variant: str, seed: int, steps: int = 200):
  """The shipped config of `variant`, narrow and short."""
  made = VARIANTS[variant].get_config()
  made.seed, made.report.at = seed, 'never'
  made.model.update(dim=48)
  made.model.feed_forward.hidden = 96
  if 'moe' in made.model:
    made.model.moe.experts.hidden = 96
  made.data.update(length=64, batch_size=24)
  for name, share in dict(code=0.003, dialogue=0.004, prose=0.08).items():
    made.data.source.sources[name].test_fraction = share
  made.training.update(steps=steps, log_every=steps // 4)
  made.evaluation.every = steps
  made.evaluation.evaluators = dict(test=dict(name='domains'))
  made.checkpoint.every = steps
  return made


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--variant', choices=VARIANTS, required=True)
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--out', required=True)
  arguments = parser.parse_args()
  run(config(arguments.variant, arguments.seed), arguments.out)
