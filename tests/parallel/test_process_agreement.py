"""Several processes compute the same training step as one device: loss, gradients, metrics, dropped tokens.

Oracle: the same step on one device, and (slow) on the same mesh in one process. All share the data pipeline: each
process reads the rows that it feeds, one device reads all.
"""
import itertools
import json

import numpy as np
import pytest

import agreement_cases
import process_launcher


def every_dispatcher(kinds, meshes):
  """Every dispatcher in models of these kinds, 'family/dispatcher/layers', over these meshes; both in turn."""
  dispatchers = ('reference', 'einsum', 'gather', 'grouped')
  return [f'{kind.format(dispatcher)}/{mesh}'
          for dispatcher, kind, mesh in zip(dispatchers, itertools.cycle(kinds), itertools.cycle(meshes))]


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


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_processes_agree_and_take_the_step_of_one_device(count, take_steps, tmp_path):
  cases = [f'decoder/einsum/scan/data=2 model={count}']  # half of them feed the same rows
  assert_agree(*cases, *take_steps(cases, count), *take_steps(on_one_device(cases), devices=1))

  told = [json.loads((tmp_path / '0' / f'{index}.json').read_text()) for index in range(count)]
  # Process i has the i-th device and the (i + count)-th, each with its share of the 16 rows.
  rows = np.arange(16).reshape(2, count, -1)
  assert [one['rows'] for one in told] == [rows[:, i].ravel().tolist() for i in range(count)]
  for one in told:
    assert one['placed'] == list(range(0, 160, 10))
    assert one['largest'] == 6 + count and one['before'] == [0, count - 1, 0]
    assert one['union'] == {'all': [1], **{str(i): 'x' * 9 ** i for i in range(count)}}
  assert [one['failure'] for one in told] == ["'three'"] + (count - 1) * ['another process could not count to three']


@pytest.mark.slow
@pytest.mark.parametrize('count, cases', [
    (2, every_dispatcher(('decoder/{}/scan', 'vision/{}/unrolled'), ('data=2 expert=2', 'fsdp=2 model=2', 'data=4'))),
    (4, every_dispatcher(('decoder/{}/unrolled', 'vision/{}/scan'),
                         ('data=2 expert=4', 'expert=2 model=4', 'fsdp=4 expert=2')))])
def test_every_dispatcher_takes_the_step_of_one_device_and_of_its_mesh_in_one_process(take_steps, count, cases):
  found = take_steps(cases, count)
  for expected in (take_steps(on_one_device(cases), devices=1), take_steps(cases, devices=2 * count)):
    for name, *both in zip(cases, found, expected, strict=True):
      assert_agree(name, *both)
