"""The commands over several processes: a run resumed with another number of processes is unchanged.

Oracle: the metrics of an undisturbed process with one device.
"""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import process_launcher
from moejax.training import metrics

STEPS = 150
HOST_PORT = process_launcher.ROOT / 'experiments' / 'launch' / 'host_port.sh'
CONFIG = Path(__file__).with_name('process_config.py')


def command(folder, *flags):
  return ['-m', 'moejax.train', f'--config={CONFIG}:{STEPS}', f'--workdir={folder}', *flags]


def host_port(folder, log, cache, *flags):
  """Two processes of two devices each, with all that they say in the file `log`."""
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  environment = process_launcher.environment(2, cache) | dict(PATH=path)
  with open(log, 'w') as file:
    return subprocess.Popen([HOST_PORT, '2', *command(folder, *flags)[2:]], stdout=file, stderr=subprocess.STDOUT,
                            env=environment, cwd=process_launcher.ROOT)


def wait_for_step(folder, step, process):
  """Returns once `folder` has a row for `step` or a later one, or `process` has ended."""
  while process.poll() is None and max((row['step'] for row in metrics.read(folder)), default=0) < step:
    time.sleep(0.005)


def stopped_at(said, count):
  """The step that all `count` processes say they have stopped after."""
  step, = set(re.findall(rf'Stopped after step (\d+) of {STEPS}', said))
  assert said.count(f'Stopped after step {step} of') == count
  return int(step)


def assert_same_run(folder, undisturbed):
  rows, expected = metrics.read(folder), metrics.read(undisturbed)
  assert [row['step'] for row in rows] == [row['step'] for row in expected] == list(range(1, STEPS + 1))
  for row, wanted in zip(rows, expected):
    for name, value in metrics.repeatable(wanted).items():
      # The batches are the same, of others losses would differ in the second digit; sums are in another order.
      np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=f'step {row["step"]} {name}')
  assert any(row['router/block_00/dropped'] > 0 for row in expected)
  assert expected[-1]['eval/test/tokens'] > 0


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, cache):
  folder = tmp_path_factory.mktemp('undisturbed')
  process_launcher.run(command(folder), 1, devices=1, cache=cache)
  return folder


@pytest.mark.slow
def test_if_one_of_two_processes_is_interrupted_both_save_and_a_single_one_resumes(tmp_path, undisturbed, cache):
  folder, log = tmp_path / 'run', tmp_path / 'log'
  script = host_port(folder, log, cache)
  wait_for_step(folder, 10, script)
  os.kill(int(re.search(r'Process 1 of 2 has PID (\d+)', log.read_text())[1]), signal.SIGTERM)
  assert script.wait(timeout=500) == 128 + signal.SIGTERM, log.read_text()
  step = stopped_at(log.read_text(), 2)
  assert 10 <= step < STEPS
  assert os.listdir(folder / 'checkpoints') == [str(step)]

  said, = process_launcher.run(command(folder), 1, devices=1, cache=cache)
  assert f'Resuming after step {step} of {STEPS}' in said
  assert_same_run(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.slow
def test_one_process_stopped_two_go_on_write_the_report_and_evaluate_as_one(tmp_path, undisturbed, cache):
  folder, log = tmp_path / 'run', tmp_path / 'log'
  process, = process_launcher.start(command(folder), 1, cache=cache)
  wait_for_step(folder, 10, process)
  process.terminate()
  (code, _, said), = process_launcher.finish([process])
  assert code == 128 + signal.SIGTERM and stopped_at(said, 1) < STEPS

  assert host_port(folder, log, cache, '--config.report.at=end').wait(timeout=500) == 0, log.read_text()
  assert_same_run(folder, undisturbed)
  said = log.read_text()
  assert said.count(f'Finished: {STEPS} steps.') == said.count('Resuming after step') == 1  # the first process speaks
  assert (folder / 'report' / 'index.html').stat().st_size > 10_000

  outputs = [process_launcher.run(['-m', 'moejax.evaluate', f'--workdir={folder}'], count, cache=cache)
             for count in (1, 2)]
  numbers = [[float(number) for number in re.findall(r'^  \S+ +([\d.e+-]+)$', out[0], re.MULTILINE)] for out in outputs]
  assert len(numbers[0]) > 4
  np.testing.assert_allclose(*numbers, rtol=1e-4)  # printed to five digits
  assert 'evaluations.jsonl' in outputs[1][0] and 'evaluations.jsonl' not in outputs[1][1]


@pytest.mark.slow
def test_two_processes_start_from_the_parameters_that_one_starts_from(tmp_path, undisturbed, cache):
  flags = ['--config.init.name=checkpoint', f'--config.init.path={undisturbed}', '--config.training.steps=3']
  rows = []
  for count in (1, 2):
    outputs = process_launcher.run(command(tmp_path / str(count), *flags), count, devices=2, cache=cache)
    said = [output.count(f'Parameters start from {undisturbed}, step {STEPS}: ') for output in outputs]
    assert said == [1, 0][:count]
    rows.append([metrics.repeatable(row) for row in metrics.read(tmp_path / str(count))])
  for row, wanted in zip(*rows, strict=True):
    for name, value in wanted.items():
      np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=f'step {row["step"]} {name}')
  losses = [row['train/loss'] for row in metrics.read(undisturbed)]
  assert abs(rows[0][0]['train/loss'] - losses[-1]) < abs(rows[0][0]['train/loss'] - losses[0])
  lineages = [(tmp_path / name / 'lineage.json').read_text() for name in '12']
  assert lineages[0] == lineages[1]
