"""Where metrics go: every logger holds each step once, whenever the run stopped. Oracle: a run that did not stop."""
import csv
import dataclasses
import math
import struct
import sys

import digits_config
import pytest
from tensorboardX.proto import event_pb2
from training_fakes import make_setup

from moejax.config import ConfigError
from moejax.training import loggers, loop, metrics, setup, workdir

FAKE_WANDB = '''
"""As much of wandb as a run asks for; its server is a dict."""
import types

class Error(Exception):
  pass

errors = types.SimpleNamespace(Error=Error)
rows, calls, broken = {}, [], False

def init(**options):
  calls.append(options)
  if broken:
    raise Error('api_key not configured (no-tty). call wandb login.')
  return Run(rows.setdefault(options['id'], {}), options)

class Run:
  def __init__(self, rows, options):
    self.rows, self.step = rows, max(rows, default=-1) + 1
    self.offline, self.url, self.dir = False, f"https://wandb.test/{options['id']}", options['dir']

  def log(self, row, step):
    assert step not in self.rows, 'a step only increases'
    self.rows[step] = row

  def finish(self, exit_code):
    calls.append(exit_code)
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  """A fake of the package, installed for this test."""
  (tmp_path / 'packages').mkdir()
  (tmp_path / 'packages' / 'wandb.py').write_text(FAKE_WANDB)
  monkeypatch.syspath_prepend(tmp_path / 'packages')
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  import wandb
  yield wandb
  sys.modules.pop('wandb', None)


def row(step):
  """What is logged at `step`: some metrics appear late, and one is not finite."""
  values = {'train/loss': step / 3, 'train/skipped': step == 2, 'router/a/load': [0.25, 0.75]}
  values |= {'time/step_seconds': 0.1} if step > 1 else {}
  values |= {'eval/test/loss': math.inf if step == 4 else 1.5} if step % 2 == 0 else {}
  return values


def write(folder, names, restored, *steps, say=print):
  folder.mkdir(exist_ok=True)
  with metrics.MetricsWriter(folder, restored, say, names, dict(seed=1)) as writer:
    for step in steps:
      writer.write(step, row(step))
  return writer


def rows_of(folder):
  with open(folder / 'metrics.csv', newline='') as file:
    return list(csv.DictReader(file))


def events(folder):
  """The events of all files of TensorBoard, in the order in which they were written."""
  found = []
  for path in sorted(folder.glob('tensorboard/*')):
    data = path.read_bytes()
    while data:  # records of length, its checksum, event, its checksum
      size, = struct.unpack('<Q', data[:8])
      found.append(event_pb2.Event.FromString(data[12:12 + size]))
      data = data[16 + size:]
  return found


# ---- csv ------------------------------------------------------------------------------------------------------------


def test_a_csv_has_one_header_with_the_columns_that_appear_late_at_its_end(tmp_path):
  write(tmp_path, ['csv'], 0, 1, 2, 3, 4)
  found = rows_of(tmp_path)
  assert list(found[0]) == ['step', 'train/loss', 'train/skipped', 'router/a/load/smallest', 'router/a/load/largest',
                            'time/step_seconds', 'eval/test/loss']
  assert [one['step'] for one in found] == ['1', '2', '3', '4']
  assert [float(one['train/loss']) for one in found] == [1 / 3, 2 / 3, 1., 4 / 3]
  assert [one['time/step_seconds'] for one in found] == ['', '0.1', '0.1', '0.1']
  assert [one['eval/test/loss'] for one in found] == ['', '1.5', '', 'nan']
  assert [one['train/skipped'] for one in found] == ['0', '1', '0', '0']
  assert {one['router/a/load/largest'] for one in found} == {'0.75'}


def test_a_csv_can_be_read_after_every_row(tmp_path):
  with metrics.MetricsWriter(tmp_path, 0, loggers=['csv']) as writer:
    assert rows_of(tmp_path) == []
    for step in range(1, 5):
      writer.write(step, row(step))
      assert [one['step'] for one in rows_of(tmp_path)] == [str(n) for n in range(1, step + 1)]


@pytest.mark.parametrize('restored', range(5))
def test_a_csv_of_a_run_that_resumes_is_that_of_one_that_did_not_stop(tmp_path, restored):
  write(tmp_path / 'whole', ['csv'], 0, 1, 2, 3, 4, 5)
  write(tmp_path / 'resumed', ['csv'], 0, 1, 2, 3, 4)
  with open(tmp_path / 'resumed' / 'metrics.csv', 'a') as file:
    file.write('5,1.6')  # cut off
  write(tmp_path / 'resumed', ['csv'], restored, *range(restored + 1, 6))
  assert (tmp_path / 'resumed' / 'metrics.csv').read_bytes() == (tmp_path / 'whole' / 'metrics.csv').read_bytes()


def test_a_logger_that_is_named_when_the_run_resumes_gets_the_rows_from_before(tmp_path, wandb):
  write(tmp_path / 'run', [], 0, 1, 2)
  write(tmp_path / 'run', ['csv', 'tensorboard', 'wandb'], 2, 3)
  assert [one['step'] for one in rows_of(tmp_path / 'run')] == ['1', '2', '3']
  assert sorted({event.step for event in events(tmp_path / 'run') if event.summary.value}) == [1, 2, 3]
  sent, = wandb.rows.values()
  assert list(sent) == [1, 2, 3]


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_is_told_to_drop_what_lies_behind_the_checkpoint(tmp_path):
  write(tmp_path, ['tensorboard'], 0, 1, 2, 3)
  before, = (tmp_path / 'tensorboard').iterdir()
  before.rename(tmp_path / 'before')  # files are named by the second
  write(tmp_path, ['tensorboard'], 1, 2)
  again = events(tmp_path)
  start, = [event for event in again if event.HasField('session_log')]
  assert start.session_log.status == start.session_log.START and start.step == 2
  assert {value.tag for event in again if event.step == 2 for value in event.summary.value} == {
      'train/loss', 'train/skipped', 'router/a/load/smallest', 'router/a/load/largest', 'time/step_seconds',
      'eval/test/loss'}


def test_tensorboard_gets_nothing_that_is_not_finite(tmp_path):
  write(tmp_path, ['tensorboard'], 0, 4)
  assert 'eval/test/loss' not in {value.tag for event in events(tmp_path) for value in event.summary.value}


# ---- Weights & Biases -----------------------------------------------------------------------------------------------


def test_wandb_resumes_its_run_when_the_run_does(tmp_path, wandb):
  write(tmp_path / 'run', ['wandb'], 0, 1, 2)
  write(tmp_path / 'run', ['wandb'], 2, 3)
  first, ended, second, _ = wandb.calls
  assert first['id'] == second['id'] and first['resume'] == 'allow' and ended == 0
  assert first['project'] == 'moejax' and first['name'] == 'run' and first['config'] == dict(seed=1)
  sent, = wandb.rows.values()
  assert {step: one['train/loss'] for step, one in sent.items()} == {1: 1 / 3, 2: 2 / 3, 3: 1.}


def test_wandb_says_what_it_cannot_take_back_and_gets_no_step_twice(tmp_path, wandb):
  said = []
  write(tmp_path / 'run', ['wandb'], 0, 1, 2, 3, 4)
  write(tmp_path / 'run', ['wandb'], 2, 3, 4, 5, say=said.append)
  assert said == ['wandb has rows up to step 4 and cannot take back those after step 2: it keeps them, and gets new ones '
                  'from step 5 on.']
  sent, = wandb.rows.values()
  assert list(sent) == [1, 2, 3, 4, 5]


def test_wandb_hears_of_a_run_that_failed(tmp_path, wandb):
  with pytest.raises(RuntimeError):
    with metrics.MetricsWriter(tmp_path, 0, loggers=['wandb']):
      raise RuntimeError('power failure')
  assert wandb.calls[-1] == 1


def test_where_wandb_cannot_begin_a_sentence_says_what_to_do(tmp_path, wandb):
  wandb.broken = True
  with pytest.raises(ConfigError, match="^config.loggers: 'wandb' cannot begin: api_key not configured .*wandb login.*"
                                        "WANDB_MODE=offline"):
    metrics.MetricsWriter(tmp_path, 0, loggers=['wandb'])


# ---- names ----------------------------------------------------------------------------------------------------------


def test_metrics_jsonl_is_written_once_whether_it_is_named_or_not(tmp_path):
  for names in ([], ['jsonl'], ['csv', 'jsonl']):
    write(tmp_path, names, 0, 1, 2)
    assert [one['step'] for one in metrics.read(tmp_path)] == [1, 2]


def test_a_name_that_is_none_is_refused_with_the_nearest():
  config = digits_config.get_config()
  config.loggers = ('tensorbord',)
  with pytest.raises(ConfigError, match="config.loggers: there is no logger 'tensorbord'. Did you mean 'tensorboard'"):
    setup.build(config)


def test_a_run_that_logs_with_a_package_that_is_missing_ends_before_it_begins(tmp_path, monkeypatch):
  monkeypatch.setattr(loggers.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(loop, 'prepare', lambda config: dataclasses.replace(make_setup(), loggers=('csv', 'wandb')))
  with pytest.raises(ConfigError, match="'wandb' needs the package wandb, which is not installed. Install it"):
    loop.run(None, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_run_may_resume_with_other_loggers_and_another_profile(tmp_path):
  workdir.claim(tmp_path, setup.default_config())
  other = setup.default_config()
  other.loggers, other.profile.start = ('csv',), 7
  changes = workdir.claim(tmp_path, other)
  assert [line.split(': ')[1].split()[0] for line in changes] == ['loggers', 'profile.start']


def test_a_config_from_before_there_were_loggers_still_has_tensorboard():
  config = digits_config.get_config()
  del config.loggers, config.profile
  built = setup.build(config)
  assert built.loggers == ('tensorboard',) and built.profile.start is None


@pytest.mark.parametrize('there', [True, False])
def test_the_end_of_a_run_names_only_what_is_installed(tmp_path, monkeypatch, there):
  monkeypatch.setattr(loggers, 'installed', lambda program: there)
  writer = write(tmp_path, ['csv', 'tensorboard'], 0, 1)
  assert writer.where() == [f'{tmp_path}/metrics.jsonl', f'{tmp_path}/metrics.csv',
                            *([f'tensorboard --logdir {tmp_path}/tensorboard'] if there else [])]


def test_a_program_is_installed_where_it_is_on_the_path_or_importable(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert not loggers.installed('none_of_ours')
  (tmp_path / 'none_of_ours').touch(0o755)
  assert loggers.installed('none_of_ours')
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'another.py').touch()
  assert loggers.installed('another')
