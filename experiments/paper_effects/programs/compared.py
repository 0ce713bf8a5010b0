"""Trains a shipped config, small and short, as it is or with another selection."""
import importlib

from experiments.paper_effects.programs import command
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
    'swipe': ('fastmoe_swipe_chitchat', TEXT, None),
    'two best experts': ('fastmoe_swipe_chitchat', TEXT, dict(name='top_k', k=2)),
    'one hash': ('hash_chitchat', TEXT, None),
    'two hashes': ('multi_hash_chitchat', TEXT, None),
    # As many slots as patches, each of which two experts see in the other.
    'soft slots': ('soft_moe_digits', IMAGES | {'model.moe.experts.hidden': 128}, None),
    'two experts a patch': ('vmoe_digits', IMAGES, None),
}


def main():
  given = command.arguments(VARIANTS)
  name, sizes, select = VARIANTS[given.variant]
  config = importlib.import_module(f'configs.{name}').get_config()
  config.update_from_flattened_dict(sizes)
  if select is not None:
    with config.unlocked():
      config.model.moe.router.select = select
  config.seed = given.seed
  config.training.steps = 200
  config.optimizer.schedule.warmup = 20
  config.evaluation.every = 200
  config.checkpoint.every = 200
  config.report.at = 'never'
  run(config, given.out)


if __name__ == '__main__':
  main()
