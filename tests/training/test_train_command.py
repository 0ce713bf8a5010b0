"""The command, in processes of its own: killed at any time, it resumes where it was and ends with the same numbers.

Oracle: the metrics and parameters of an undisturbed process, compared to the last bit.
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax import command_line
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.training import metrics
from moejax.training.durability import restore, stop_reasons

CONFIG = Path(__file__).with_name('digits_config.py')
STEPS = 100


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Starts the command for a folder; programs compiled by one process are used by the next."""
  cache = tmp_path_factory.mktemp('compiled')
  environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
                     JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1', JAX_PLATFORMS='cpu')

  def start(folder):
    return subprocess.Popen([sys.executable, '-m', 'moejax.train', f'--config={CONFIG}:{STEPS}', f'--workdir={folder}'],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return start


def finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def wait_for_step(process, folder, step):
  """Returns once `folder` has a row for `step` or a later one."""
  while process.poll() is None:
    rows = metrics.read(folder)
    if rows and rows[-1]['step'] >= step:
      return
    time.sleep(0.005)
  pytest.fail(f'the process ended before step {step}: {finish(process)}')


def rows(folder):
  return [metrics.repeatable(row) for row in metrics.read(folder)]


@pytest.fixture(scope='module')
def undisturbed(start, tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  code, out, err = finish(start(folder))
  assert code == 0, err
  assert f'Finished: {STEPS} steps.' in out
  return folder


def assert_same_run(folder, undisturbed):
  assert rows(folder) == rows(undisturbed)
  assert [row['step'] for row in rows(folder)] == list(range(1, STEPS + 1))
  (_, step, params, router_state), expected = map(restore.restore_for_evaluation, (folder, undisturbed))
  assert step == STEPS
  for found, wanted in ((params, expected[2]), (router_state, expected[3])):
    assert flatten(found).keys() == flatten(wanted).keys()
    for path, value in flatten(found).items():
      np.testing.assert_array_equal(value, flatten(wanted)[path])
  assert not list((folder / 'checkpoints').glob('*tmp*'))


@pytest.mark.slow
def test_a_run_that_was_killed_and_then_terminated_ends_as_if_it_had_not_been(start, undisturbed, tmp_path):
  process = start(tmp_path)
  wait_for_step(process, tmp_path, 23)  # when it saves 20 it has saved 10
  process.kill()
  assert finish(process)[0] == -signal.SIGKILL

  process = start(tmp_path)
  wait_for_step(process, tmp_path, 53)
  process.send_signal(signal.SIGTERM)
  sent = time.monotonic()
  code, out, err = finish(process)
  assert code == 143
  assert time.monotonic() - sent < 30  # as long as a cloud leaves before it takes the machine; a second on a free one
  assert 'Resuming after step' in out
  assert 'The same command resumes from there.' in err and 'Traceback' not in err

  code, out, err = finish(start(tmp_path))
  assert code == 0, err
  assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(start, undisturbed, tmp_path):
  chance = random.Random(0)
  for step in range(20, STEPS - 20, 25):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, step)
    time.sleep(chance.random() * 0.1)  # anywhere: in a step, or while a checkpoint is being written
    process.kill()
    finish(process)
  code, _, err = finish(start(tmp_path))
  assert code == 0, err
  assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_the_same_command_started_twice_runs_once(start, undisturbed, tmp_path):
  first = start(tmp_path)
  wait_for_step(first, tmp_path, 13)
  first.send_signal(signal.SIGSTOP)  # or it would have finished before the second has imported jax
  code, _, err = finish(start(tmp_path))
  first.send_signal(signal.SIGCONT)
  assert code == 2
  assert f'is in use: process {first.pid} on' in err and 'Traceback' not in err
  code, _, err = finish(first)
  assert code == 0, err
  assert_same_run(tmp_path, undisturbed)
  assert not (tmp_path / 'lock').exists()


# ---- how it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error, code', [
    (ConfigError('what to do'), 2), (stop_reasons.Diverged('what to do'), 1), (stop_reasons.Interrupted('what to do', 2), 130),
    (OSError(28, 'No space left on device'), 1), (KeyboardInterrupt(), 130)])
def test_an_error_that_the_user_can_act_on_is_a_sentence_and_an_exit_code(error, code, capsys):
  def binary():
    raise error
  with pytest.raises(SystemExit) as ended:
    command_line.in_one_sentence(binary)
  assert ended.value.code == code
  printed = capsys.readouterr().err
  assert ('what to do' in printed or 'same command' in printed) and 'Traceback' not in printed


def test_a_bug_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError):
    command_line.in_one_sentence(lambda: 1 / 0)
