"""The run for fault injection: a tiny sparse vision transformer, whose router has noise and state."""
from moejax.routing import papers
from moejax.training.setup import default_config


def get_config(steps: str = '100'):
  """Few fast `steps`; every step is logged, and every fifth is saved."""
  config = default_config()
  config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=16)
  config.objective = dict(name='classification')
  config.model = dict(
      name='vision', image_size=8, channels=1, patch_size=4, num_classes=10, dim=8, num_layers=1,
      attention=dict(heads=2), feed_forward=dict(hidden=8), sparse=dict(name='every', n=1),
      moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=papers.loss_free(k=1),
               dispatch=dict(name='einsum')))
  config.model.moe.router.score.noise_std = '1/E'
  config.model.moe.router.place = dict(name='capacity', capacity_factor=2.0)
  config.optimizer.schedule.warmup = 5
  config.training.update(dict(steps=int(steps), log_every=1, average=0.9))
  config.evaluation = dict(every=20, evaluators=dict(test=dict(name='accuracy', split='test')))
  config.checkpoint.every = 5
  config.recovery.update(dict(skip='spikes', spike=3.0, patience=2, max_rollbacks=20, slow_data=0.5, data_timeout=2.0))
  config.report.at = 'never'
  return config
