"""The command, in processes of its own: killed at any time it goes on where it was, and ends with the same numbers.

Oracle: the metrics and parameters of a process that nobody disturbed, compared to the last bit.
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
from absl import flags
from ml_collections import config_flags

from moejax import train
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.training import checkpoint, metrics, recovery

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
  return [{name: value for name, value in row.items() if not name.startswith('time/')} for row in metrics.read(folder)]


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
  (_, step, params, router_state), expected = map(checkpoint.restore_for_evaluation, (folder, undisturbed))
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
  assert 'Going on after step' in out
  assert 'The same command goes on from there.' in err and 'Traceback' not in err

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


# ---- bad input ------------------------------------------------------------------------------------------------------


def parse(*arguments, file=CONFIG):
  argv = ['train', f'--config={file}', *arguments]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', None, 'config', flag_values=values)
  flags.DEFINE_string('workdir', None, 'folder', flag_values=values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', argv)  # where config_flags finds overrides
    train.parse_flags(argv, values)
  return config.value


def test_any_key_can_be_set_from_the_command_line():
  config = parse('--config.training.steps=7', '--config.optimizer.schedule.peak=1',
                 '--config.model.moe.router.select.k=2', '--config.training.average=0.5',
                 '--config.checkpoint.metric=eval/test/accuracy')
  assert (config.training.steps, config.optimizer.schedule.peak, config.model.moe.router.select.k) == (7, 1., 2)
  assert (config.training.average, config.checkpoint.metric) == (0.5, 'eval/test/accuracy')


@pytest.mark.parametrize('text, value', [('0.5', 0.5), ('None', None), ('(1, 2)', (1, 2)), ('word', 'word')])
def test_a_key_that_is_none_can_be_anything(text, value):
  fairseq = Path(__file__).parents[2] / 'configs/fairseq_chitchat.py'
  config = parse(f'--config.model.moe.router.place.eval_capacity_factor={text}', file=fairseq)
  assert config.model.moe.router.place.eval_capacity_factor == value


@pytest.mark.parametrize('argument, sentence', [
    ('--config.training.stpes=7', "--config.training.stpes: the config has no key 'stpes'. Did you mean 'steps'?"),
    ('--config.trainig.steps=7', "--config.trainig.steps: the config has no key 'trainig'. Did you mean 'training'?"),
    ('--config.training.steps=many', '--config.training.steps=many: invalid literal for int'),
    ('--wrokdir=x', "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
    ('--config=nowhere.py', 'There is no such config file: '),
])
def test_what_cannot_be_parsed_is_said_in_a_sentence(argument, sentence):
  with pytest.raises(ConfigError) as error:
    train.checked(parse(argument))
  assert sentence in str(error.value)


@pytest.mark.parametrize('error, code', [
    (ConfigError('what to do'), 2), (recovery.Diverged('what to do'), 1), (recovery.Interrupted('what to do', 2), 130),
    (OSError(28, 'No space left on device'), 1), (KeyboardInterrupt(), 130)])
def test_what_a_person_can_act_on_is_a_sentence_and_an_exit_code(error, code, capsys):
  def binary():
    raise error
  with pytest.raises(SystemExit) as ended:
    train.in_one_sentence(binary)
  assert ended.value.code == code
  printed = capsys.readouterr().err
  assert ('what to do' in printed or 'same command' in printed) and 'Traceback' not in printed


def test_what_is_a_fault_of_the_program_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError):
    train.in_one_sentence(lambda: 1 / 0)
