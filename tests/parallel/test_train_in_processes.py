"""The commands over several processes: stopped and gone on with over another number of them, a run stays what it was.

Oracle: the metrics of one process with one device, that nobody disturbed.
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


def last_step(folder):
  return max((row['step'] for row in metrics.read(folder)), default=0)


def stopped(folder, processes, after):
  """Sends SIGTERM to the last of `processes` once step `after` is taken; returns where all of them stopped."""
  while last_step(folder) < after and all(process.poll() is None for process in processes):
    time.sleep(0.005)
  processes[-1].terminate()
  results = process_launcher.finish(processes)
  assert {code for code, _, _ in results} == {128 + signal.SIGTERM}, results
  steps = {re.search(rf'Stopped after step (\d+) of {STEPS}', errors)[1] for _, _, errors in results}
  assert len(steps) == 1, 'they have stopped at different steps'
  step = int(steps.pop())
  assert os.listdir(folder / 'checkpoints') == [str(step)]
  return step


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, cache):
  folder = tmp_path_factory.mktemp('undisturbed')
  process_launcher.run(command(folder), 1, devices=1, cache=cache)
  return folder


@pytest.fixture(scope='module')
def disturbed(tmp_path_factory, cache):
  """Begun by two processes, gone on with by one, and brought to its end by the two of host_port.sh."""
  folder = tmp_path_factory.mktemp('disturbed')
  first = stopped(folder, process_launcher.start(command(folder), 2, cache=cache), after=10)
  second = stopped(folder, process_launcher.start(command(folder), 1, cache=cache), after=first + 10)
  assert first < second < STEPS
  environment = process_launcher.environment(2, cache) | dict(
      PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
  script = subprocess.run([HOST_PORT, '2', *command(folder, '--config.report.at=end')[2:]], capture_output=True, text=True,
                          env=environment, timeout=500, cwd=process_launcher.ROOT)
  assert script.returncode == 0, script.stdout + script.stderr
  return folder, script.stdout


def test_a_run_over_two_then_one_then_two_processes_is_that_of_one(undisturbed, disturbed):
  rows, expected = metrics.read(disturbed[0]), metrics.read(undisturbed)
  assert [row['step'] for row in rows] == [row['step'] for row in expected] == list(range(1, STEPS + 1))
  for row, wanted in zip(rows, expected):
    wanted = {name: value for name, value in wanted.items() if not name.startswith('time/')}
    for name, value in wanted.items():
      # Batches are the same, to the row: losses of others differ in the second digit. Sums are taken in another order.
      np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=f'step {row["step"]} {name}')
  assert any(row['router/block_00/dropped'] > 0 for row in expected)
  assert expected[-1]['eval/test/tokens'] == rows[-1]['eval/test/tokens'] > 0


def test_one_process_of_several_speaks_and_writes_the_report(disturbed):
  folder, out = disturbed
  assert out.count(f'Finished: {STEPS} steps.') == out.count('Going on after step') == 1
  assert (folder / 'report' / 'index.html').stat().st_size > 10_000


@pytest.mark.slow
def test_two_processes_evaluate_a_checkpoint_as_one_does(disturbed, cache):
  folder, _ = disturbed
  outputs = [process_launcher.run(['-m', 'moejax.evaluate', f'--workdir={folder}'], count, cache=cache)
             for count in (1, 2)]
  numbers = [[float(number) for number in re.findall(r'^  \S+ +([\d.e+-]+)$', out[0], re.MULTILINE)] for out in outputs]
  assert len(numbers[0]) > 4
  np.testing.assert_allclose(*numbers, rtol=1e-4)  # printed to five digits
  assert 'evaluations.jsonl' in outputs[1][0] and 'evaluations.jsonl' not in outputs[1][1]
