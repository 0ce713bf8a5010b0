"""Values that no run can have are refused by the annotations of their keys, each with its path."""
import math

import digits_config
import pytest

from moejax.config import ConfigError
from moejax.training import setup

WRONG = {
    'seed': (-1, 2**31),
    'training.steps': (0, -5, 2**31), 'training.log_every': (0, -1), 'training.accumulate': (0, -2),
    'training.average': (0., 1., -0.5, math.nan),
    'evaluation.every': (0, -3),
    'evaluation.evaluators.test.batch_size': (-3, 0, 2**31),
    'recovery.spike': (0., math.inf), 'recovery.patience': (0,), 'recovery.max_rollbacks': (-1,),
    'recovery.slow_data': (0., -1.), 'recovery.data_timeout': (math.nan, 0., -1.), 'recovery.collapse': (0., 1.1),
    'optimizer.weight_decay': (-5, math.nan), 'optimizer.clip': (0., -1., math.nan),
    'optimizer.b1': (-0.1, 1.), 'optimizer.b2': (1., 2), 'optimizer.eps': (0., -1e-8),
    'optimizer.schedule.peak': (0., -1., math.nan, -math.inf), 'optimizer.schedule.warmup': (-1,),
    'optimizer.schedule.end': (-1e-3, math.inf),
    'objective.label_smoothing': (1., -0.1, math.nan),
    'mesh.data': (0, -2), 'mesh.model': (0, -8), 'sharding.zero': (4, -1),
}


@pytest.mark.parametrize('path, value', [(path, value) for path, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_refused_with_its_path(path, value):
  config = digits_config.get_config()
  *parents, name = path.split('.')
  node = config
  for parent in parents:
    node = node[parent]
  with config.unlocked(), node.unlocked(), node.ignore_type():
    node[name] = value
  with pytest.raises(ConfigError, match=rf'^config\.{path.replace(".", "[.]")} must be '):
    setup.prepare(config)


@pytest.mark.parametrize('method', ['consistency', 'reinforce'])
def test_coefficients_of_methods_are_not_negative(method):
  config = digits_config.get_config()
  key = dict(consistency='alpha', reinforce='entropy')[method]
  config.method = {'name': method, key: -1.}
  with pytest.raises(ConfigError, match=f'^config.method.{key} must be a float of at least 0, not -1.0'):
    setup.prepare(config)
