"""A small language model of three domains of text: dense, with experts by domain, or routed by task or token.

All have the same active compute. metrics.jsonl is that of the training run.
"""
import argparse

from configs import demix_domains, dense_domains, task_moe_domains
from moejax.routing import papers
from moejax.training.loop import run

VARIANTS = ('dense', 'demix', 'task', 'token')


def config(variant: str, seed: int, steps: int = 200):
  """The shipped config of `variant`, narrow and short."""
  made = {'demix': demix_domains, 'dense': dense_domains}.get(variant, task_moe_domains).get_config()
  made.seed, made.report.at = seed, 'never'
  made.model.update(dim=48)
  made.model.feed_forward.hidden = 96
  if 'moe' in made.model:
    made.model.moe.experts.hidden = 96 if variant == 'demix' else 48
  if variant == 'token':
    made.model.moe.router = papers.task_moe(num_tasks=3, level='token')
  made.data.update(length=64, batch_size=24)
  for name, share in dict(code=0.003, dialogue=0.004, prose=0.08).items():
    made.data.source.sources[name].test_fraction = share
  made.training.update(steps=steps, log_every=steps // 4)
  made.evaluation.update(every=steps, evaluators=dict(test=dict(name='domains')))
  made.checkpoint.every = steps
  return made


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--variant', choices=VARIANTS, required=True)
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--out', required=True)
  arguments = parser.parse_args()
  run(config(arguments.variant, arguments.seed), arguments.out)
