"""Several processes take the same training step as one device: loss, gradients, metrics, dropped tokens.

Oracle: the same step on one device, and (slow) on the same mesh in one process. All share the data pipeline: each
process reads the rows that it feeds, one device reads all.
"""
import itertools
import json

import numpy as np
import pytest

import agreement_cases
import process_launcher

# In the second case all processes feed the same rows, in the third two and two do.
TWO = ['vision/grouped/unrolled/fsdp=2 expert=2', 'decoder/einsum/scan/model=4']
FOUR = ['decoder/einsum/scan/data=2 model=4']


def every_case(meshes):
  kinds = itertools.product(('decoder', 'vision'), ('reference', 'einsum', 'gather', 'grouped'), ('scan', 'unrolled'))
  return [f'{"/".join(kind)}/{mesh}' for kind, mesh in zip(kinds, itertools.cycle(meshes))]


def on_one_device(cases):
  return [f'{name.rpartition("/")[0]}/data=1' for name in cases]


@pytest.fixture
def take_steps(tmp_path):
  """Function (cases, processes, devices of each) -> [(metrics of each step, parameters)]; metrics are the same in all.

  Each call leaves what `agreement_cases.agree` gave in a numbered folder.
  """
  def take_steps(cases, count=1, devices=2):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    script = [agreement_cases.__file__, f'--cases={json.dumps(cases)}', f'--folder={folder}']
    process_launcher.run(script, count, devices=devices)
    results = []
    for number, name in enumerate(cases):
      metrics, *others = [json.loads((folder / f'{number}-{index}.json').read_text()) for index in range(count)]
      assert all(other == metrics for other in others), name
      results.append((metrics, dict(np.load(folder / f'{number}-0.npz'))))
    return results
  return take_steps


def assert_agree(name, found, expected):
  # Sums over the batch, and over heads and hidden units, are taken in another order: float32 rounding, relative to the
  # largest term of a sum, through two steps.
  (metrics, params), (expected_metrics, expected_params) = found, expected
  for row, wanted in zip(metrics, expected_metrics, strict=True):
    assert row.keys() == wanted.keys()
    for key in row:
      np.testing.assert_allclose(row[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=f'{name} {key}')
  dropped = [value for row in expected_metrics for key, value in row.items() if key.endswith('/dropped')]
  assert dropped and min(dropped) > 0  # or it would not be tested
  assert params.keys() == expected_params.keys()
  for path in params:
    np.testing.assert_allclose(params[path], expected_params[path], rtol=1e-4, atol=1e-5, err_msg=f'{name} {path}')


def test_two_and_four_processes_take_the_step_of_one_device_and_agree(take_steps, tmp_path):
  expected = take_steps(on_one_device(TWO), devices=1)
  for name, found, wanted in zip(TWO + FOUR, take_steps(TWO, 2) + take_steps(FOUR, 4), expected + expected[-1:],
                                 strict=True):
    assert_agree(name, found, wanted)
  first, second = (json.loads((tmp_path / '1' / f'{index}.json').read_text()) for index in range(2))
  # Of four devices in the order 0, 2, 1, 3 the first process has 0 and 1: the first and the third quarter of the batch.
  assert first['rows'] == [0, 1, 2, 3, 8, 9, 10, 11] and second['rows'] == [4, 5, 6, 7, 12, 13, 14, 15]
  assert first['placed'] == second['placed'] == list(range(0, 160, 10))
  assert first['largest'] == second['largest'] == 8
  assert first['before'] == second['before'] == [0, 1, 0]
  assert first['union'] == second['union'] == {'all': [1], '0': 'x', '1': 'x' * 9}
  assert [first['failure'], second['failure']] == ["'three'", 'another process could not count to three']


@pytest.mark.slow
@pytest.mark.parametrize('count, meshes', [(2, ('data=2 expert=2', 'fsdp=2 model=2', 'data=4')),
                                           (4, ('data=2 expert=4', 'expert=2 model=4', 'fsdp=4 expert=2'))])
def test_processes_take_the_step_of_one_device_and_of_their_mesh_in_one_process_in_every_case(take_steps, count, meshes):
  cases = every_case(meshes)
  found = take_steps(cases, count)
  for expected in (take_steps(on_one_device(cases), devices=1), take_steps(cases, devices=2 * count)):
    for name, *both in zip(cases, found, expected, strict=True):
      assert_agree(name, *both)
