"""What a person sees before the first row of metrics. Oracle: sizes by hand."""
import digits_config
import jax
import pytest
from training_fakes import make_setup

from moejax.functional import flatten
from moejax.training import loop, progress, setup


def sizes(made):
  """(all parameters, those of routed experts)."""
  leaves = flatten(made.model.shapes()[0])
  return sum(leaf.size for leaf in leaves.values()), sum(
      leaf.size for path, leaf in leaves.items() if '/experts/' in path)


@pytest.mark.parametrize('changes, devices, data', [
    ({}, '8 cpu, mesh data=8', '16 examples a batch, 20 steps'),
    ({'mesh.expert': 2, 'mesh.model': 2}, '8 cpu, mesh data=2 expert=2 model=2', '16 examples a batch, 20 steps'),
    ({'training.accumulate': 2, 'training.steps': 12000}, '8 cpu, mesh data=8',
     '16 examples a batch in 2 parts, 12,000 steps')])
def test_a_run_begins_with_devices_parameters_and_data(changes, devices, data):
  config = digits_config.get_config()
  for path, value in changes.items():
    section, key = path.split('.')
    config[section][key] = value
  made = setup.prepare(config)
  total, of_experts = sizes(made)
  active = total - of_experts * 3 // 4  # one expert of four for each token
  assert progress.describe(made) == [
      f'Devices        {devices}', f'Model          vision: {total:,} parameters, {active:,} active',
      f'Data           digits: {data}', 'Learning rate  cosine: peak 0.001, warmup 5']


def test_one_device_has_no_mesh_to_speak_of():
  made = setup.prepare(digits_config.get_config(), jax.devices()[:1])
  assert progress.describe(made)[0] == 'Devices        1 cpu'


def test_compiling_is_said_when_it_begins_and_when_it_is_done(tmp_path):
  said = []
  loop.train(make_setup(training=dict(steps=3)), tmp_path, said.append)
  assert said[0] == 'Compiling the training step ...'
  assert said[1].startswith('Compiling the training step took 0m')
  assert said[2].startswith('step 1/3')
