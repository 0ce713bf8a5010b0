"""A run that does not fit into memory is refused before anything is allocated, written or compiled."""
import importlib

import jax
import numpy as np
import pytest

from moejax import config_files
from moejax.config import ConfigError
from moejax.training import device_memory, loop, setup, step


def config(**changes):
  config = importlib.import_module('configs.vmoe_digits').get_config()
  return config_files.override(config, {path.replace('__', '.'): value for path, value in changes.items()})


@pytest.mark.parametrize('changes, sentence', [
    (dict(model__dim=2**18), 'config.model: .* parameters with gradients and optimizer take .* GiB of each device'),
    (dict(model__moe__num_experts=2**20), 'config.model: .*more devices'),
    (dict(model__feed_forward__hidden=2**30), 'config.model: '),
    (dict(model__sparse=dict(name='none'), model__moe=None, evaluation__evaluators__test__batch_size=2**27 - 8),
     'config.evaluation.evaluators.test.batch_size: .* the batch .* GiB.*: lower it'),
    (dict(data__batch_size=2**27 - 8), 'config.data.batch_size: .* the batch .* GiB.*: lower it'),
])
def test_a_run_that_cannot_fit_is_refused_before_a_folder_is_created(changes, sentence, tmp_path):
  with pytest.raises(ConfigError, match=sentence):
    loop.run(config(**changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_largest_model_is_planned_here_and_not_run_here():
  built = setup.prepare(importlib.import_module('configs.switch_c4').get_config('c'))
  with pytest.raises(ConfigError, match='1.57 T parameters'):
    device_memory.check(built)


def test_it_counts_state_gradients_and_batch_and_nothing_else(monkeypatch):
  built = setup.prepare(config())
  arrays = jax.tree.leaves(step.abstract_state(built))
  held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize for leaf in arrays)
  params = jax.tree.leaves(step.abstract_state(built).params)
  held += sum(4 * np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) for leaf in params)
  held += sum(leaf.size * leaf.dtype.itemsize for leaf in built.pipeline.batch_spec().values()) // 8
  monkeypatch.setattr(device_memory, 'bytes_of_a_device', lambda mesh: held)
  device_memory.check(built)
  monkeypatch.setattr(device_memory, 'bytes_of_a_device', lambda mesh: held - 1)
  with pytest.raises(ConfigError):
    device_memory.check(built)
