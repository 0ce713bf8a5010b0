"""A small language model of three domains of text, dense or with experts that domains are routed to.

All have the same active compute. metrics.jsonl is that of the training run.
"""
from configs import cross_task_domains, demix_domains, dense_domains, task_aware_domains
from experiments.paper_effects.programs import command
from moejax.training.loop import run

# Config, and experts per token.
VARIANTS = dict(dense=(dense_domains, 1), demix=(demix_domains, 1), task_aware=(task_aware_domains, 2),
                cross_task=(cross_task_domains, 1))


def config(variant: str, seed: int, steps: int = 200):
  """The shipped config of `variant`, narrow and short."""
  module, k = VARIANTS[variant]
  made = module.get_config()
  made.seed, made.report.at = seed, 'never'
  made.model.update(dim=48)
  made.model.feed_forward.hidden = 96
  if 'experts' in made.model.get('moe', {}):
    made.model.moe.experts.hidden = 96 // k
  made.data.update(length=64, batch_size=24)
  for name, share in dict(code=0.003, dialogue=0.004, prose=0.08).items():
    made.data.source.sources[name].test_fraction = share
  made.training.update(steps=steps, log_every=steps // 4)
  made.evaluation.every = steps
  made.evaluation.evaluators = dict(test=dict(name='domains'))
  made.checkpoint.every = steps
  return made


if __name__ == '__main__':
  given = command.arguments(VARIANTS)
  run(config(given.variant, given.seed), given.out)
