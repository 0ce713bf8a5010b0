"""A small sparse decoder on text that two readers pack; its router drops tokens, and draws noise."""
from moejax.routing import papers
from moejax.training.setup import default_config


def get_config(arg):
  """The argument is the number of steps."""
  config = default_config()
  config.model = dict(
      name='decoder', vocab_size=17, dim=8, num_layers=2, attention=dict(heads=2), feed_forward=dict(hidden=8),
      sparse=dict(name='every', n=1), moe=dict(
          num_experts=4, experts=dict(name='feed_forward', hidden=8), group='sequence',
          router=papers.switch(capacity_factor=0.75), dispatch=dict(name='gather')))
  config.objective = dict(name='language_model')
  config.data = dict(
      name='language_model', length=12, batch_size=8, readers=2, shuffle_batches=3,
      tokenizer=dict(name='ids', num_ids=16),
      source=dict(name='markov_mixture', document_length=9, train_documents=64, test_documents=16))
  # Slowly, or rounding would grow over the steps until it turns over a choice between experts.
  config.optimizer.schedule = dict(name='constant', peak=1e-4)
  config.training.update(steps=int(arg), log_every=1)
  config.evaluation.evaluators = dict(test=dict(name='language_model'))
  config.checkpoint.every = 1000
  config.report.at = 'never'
  return config
