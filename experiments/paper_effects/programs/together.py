"""Trains a config of a router that assigns tokens and experts together, as it is or with a simpler selection."""
import argparse
import importlib
import pathlib

from moejax.train import run

TEXT = {'model.dim': 64, 'model.feed_forward.hidden': 128, 'model.moe.experts.hidden': 128, 'data.length': 64,
        'data.batch_size': 16, 'data.source.test_fraction': 0.002}
IMAGES = {'model.dim': 32, 'model.feed_forward.hidden': 64, 'model.moe.experts.hidden': 64}

# Variant: config, sizes, and the selection in place of its own.
VARIANTS = {
    'balanced assignment': ('base_chitchat', TEXT, None),
    'best expert': ('base_chitchat', TEXT, dict(name='top_k', k=1)),
    'transport plan': ('s_base_chitchat', TEXT, None),
    'largest logit': ('s_base_chitchat', TEXT, dict(name='top_k', k=1)),
    'sparse transport': ('sparse_ot_digits', IMAGES, None),
    'expert choice': ('sparse_ot_digits', IMAGES,
                      dict(name='expert_choice', capacity_factor=1., convention='vmoe')),
}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--variant', choices=VARIANTS, required=True)
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  options = parser.parse_args()
  name, sizes, select = VARIANTS[options.variant]
  config = importlib.import_module(f'configs.{name}').get_config()
  config.update_from_flattened_dict(sizes)
  if select is not None:
    with config.unlocked():
      config.model.moe.router.select = select
  config.seed = options.seed
  config.training.steps = 200
  config.optimizer.schedule.warmup = 20
  config.evaluation.every = 200
  config.checkpoint.every = 200
  config.report.at = 'never'
  run(config, options.out)


if __name__ == '__main__':
  main()
