"""The smallest real run: a sparse vision transformer on digits; its router has noise and state."""
from moejax.routing import papers
from moejax.training.setup import default_config


def get_config(arg=None):
  """The argument, if any, is the number of steps."""
  config = default_config()
  config.data = dict(name='images', source=dict(name='digits'), image_size=8, channels=1, batch_size=16)
  config.objective = dict(name='classification')
  config.model = dict(
      name='vision', image_size=8, channels=1, patch_size=4, num_classes=10, dim=8, num_layers=1,
      attention=dict(heads=2), feed_forward=dict(hidden=8), sparse=dict(name='every', n=1),
      moe=dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=papers.loss_free(k=1),
               dispatch=dict(name='grouped')))
  config.model.moe.router.score.noise_std = '1/E'
  config.optimizer.schedule.warmup = 5
  config.training.update(dict(steps=int(arg or 20), log_every=1, average=0.9))
  config.evaluation.evaluators = dict(test=dict(name='accuracy', split='test'))
  config.checkpoint.every = 10
  config.report.at = 'never'
  return config
