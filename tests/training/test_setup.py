"""What is wrong with a config is found before anything is compiled, and said with its path and what to do."""
import digits_config
import pytest

from moejax.config import ConfigError
from moejax.training import setup


def test_a_good_config_is_prepared():
  made = setup.prepare(digits_config.get_config())
  assert made.training.steps == 20 and list(made.evaluators) == ['test']
  assert made.mesh.size == 8
  assert made.config == digits_config.get_config().copy_and_resolve_references()


def change(*paths_and_values):
  def apply(config):
    for path, value in zip(paths_and_values[::2], paths_and_values[1::2]):
      *parents, name = path.split('.')
      with config.unlocked(), config.ignore_type():
        node = config
        for parent in parents:
          node = node[parent]
        if value is None:
          del node[name]
        else:
          node[name] = value
  return apply


WRONG = {
    'an unknown section': (change('modle', {}), "config.modle: Sections has no such key. Did you mean 'model'?"),
    'a missing section': (change('objective', None), 'config.objective is missing'),
    'a section that is no dict': (change('report', 3), 'config.report must be a dict'),
    'a seed that is no number': (change('seed', 'x'), 'config.seed must be an int'),
    'a misspelt key': (
        change('training.log_evry', 5), "config.training.log_evry: Training has no such key. Did you mean 'log_every'"),
    'a value of another type': (change('training', dict(steps=1.5)), 'config.training.steps must be an int'),
    'no steps': (change('training.steps', 0), 'config.training.steps must be an int of at least 1'),
    'no microbatch': (change('training.accumulate', 0), 'config.training.accumulate must be an int of at least 1'),
    'an average that is none': (change('training.average', 1.5), 'config.training.average must be a float above 0 and below 1'),
    'evaluation every 0 steps': (change('evaluation.every', 0), 'config.evaluation.every must be an int of at least 1'),
    'checkpoints every 0 steps': (
        change('checkpoint.every', 0), 'config.checkpoint.every must be an int of at least 1'),
    'no checkpoint kept': (
        change('checkpoint.keep', 0), 'config.checkpoint.keep must be an int of at least 1'),
    'an unknown direction': (change('checkpoint.mode', 'up'), "config.checkpoint.mode must be one of 'max', 'min'"),
    'an unknown time of the report': (change('report.at', 'noon'), "config.report.at must be one of 'end', 'never'"),
    'an evaluator that does not exist': (
        change('evaluation.evaluators.test.name', 'acuracy'), "Did you mean 'accuracy'"),
    'the best by what is not measured': (
        change('checkpoint.metric', 'eval/tset/accuracy'), "'eval/tset/accuracy' is of no evaluator"),
    'the best without evaluation': (
        change('checkpoint.metric', 'eval/test/accuracy'), 'config.checkpoint.every (10) must be a multiple of'),
    'a mesh of more devices than there are': (change('mesh.expert', 16), 'do not make 8 devices'),
    'a mesh that does not divide the experts': (
        change('model.moe.num_experts', 6, 'mesh.expert', 4), 'a positive multiple of 4, or config.mesh.expert 2'),
    'a batch that does not divide': (
        change('training.accumulate', 4), 'times 4 of config.training.accumulate. Nearest: 32'),
    'a model for other images': (change('model.image_size', 16), 'image_size'),
    'too few classes': (change('model.num_classes', 5), 'num_classes'),
    'an objective for other data': (
        change('objective.name', 'language_model'), "config.objective 'language_model' needs batches with tokens"),
    'an object in the config': (change('model.activation', len), 'config.model.activation must be a number, text'),
}


@pytest.mark.parametrize('what', WRONG)
def test_what_is_wrong_is_said_in_a_sentence(what):
  spoil, sentence = WRONG[what]
  config = digits_config.get_config()
  spoil(config)
  with pytest.raises(ConfigError) as error:
    setup.prepare(config)
  assert sentence in str(error.value)
