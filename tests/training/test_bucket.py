"""Runs whose folder is in a bucket give, file by file and bit by bit, what runs in a folder give.

The bucket is an emulator's; the oracle is the same run in a folder of this machine.
"""
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import lock_race
import numpy as np
import pytest
from training_fakes import StopsAt, make_setup

from moejax import buckets, evaluate
from moejax.config import ConfigError
from moejax.evaluation import log
from moejax.functional import flatten
from moejax.training import bucket, checkpoint, checksums, kept, lock, loop, metrics, profile, recovery, setup, step, workdir

pytestmark = [pytest.mark.gcs, pytest.mark.usefixtures('emulated_bucket')]

STEPS = 8
PARTS = dict(evaluate=True, evaluation=dict(every=4), training=dict(steps=STEPS, average=0.9), checkpoint=dict(every=4),
             loggers=('csv', 'tensorboard'))


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """All set-ups here differ in their data alone, so they can share the compiled step."""
  first = make_setup(**PARTS)
  train_step, state = step.make_train_step(first), step.init_state(first)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, 'make_train_step', lambda setup: train_step)
    patch.setattr(step, 'init_state', lambda setup: jax.tree.map(jnp.copy, state))
    yield


@pytest.fixture
def folder(request):
  """A folder of its own in the bucket."""
  return workdir.find(f'gs://bucket/runs/{request.node.name}'.replace('[', '-').replace(']', ''))


@pytest.fixture
def run(monkeypatch):
  """Trains as the command does, but with tiny parts; returns the messages."""
  def run(folder, pipeline=None, **sections):
    said = []
    monkeypatch.setattr(loop, 'prepare', lambda config: make_setup(pipeline=pipeline, **{**PARTS, **sections}))
    monkeypatch.setattr(loop.room, 'check', lambda setup: None)
    monkeypatch.setattr(loop.progress, 'describe', lambda setup: [])
    monkeypatch.setattr(loop.spanning_groups, 'notice', lambda setup: None)
    loop.run(None, folder, said.append)
    return said
  return run


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  folder = tmp_path_factory.mktemp('on_disk')
  tiny = make_setup(**PARTS)
  workdir.claim(folder, tiny.config)
  loop.train(tiny, folder, lambda sentence: None)
  return folder


def rows(folder):
  return [metrics.repeatable(row) for row in metrics.read(folder)]


def assert_same_run(folder, expected):
  assert rows(folder) == rows(expected)
  (_, number, *found), (_, _, *wanted) = map(checkpoint.restore_for_evaluation, (folder, expected))
  assert number == STEPS
  for a, b in zip(map(flatten, found), map(flatten, wanted)):
    assert a.keys() == b.keys()
    for path, value in a.items():
      np.testing.assert_array_equal(value, b[path])


def names(folder):
  return set(buckets.objects(folder))


def damage(file):
  """Flips a bit in the middle of an object."""
  content, generation = buckets.read(file)
  middle = len(content) // 2
  buckets.write(file, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:], generation)


def data_file(folder, step, item):
  """The file that an item of a checkpoint is read from."""
  data = folder / 'checkpoints' / str(step) / item / 'd'
  name, = names(data)
  return data / name


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_bit_for_bit_that_of_a_folder_and_leaves_the_same_files(run, folder, on_disk, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  said = run(folder)
  assert_same_run(folder, on_disk)
  assert kept.complete(folder) == kept.complete(on_disk) == [8, 4]
  assert workdir.load_config(folder) == workdir.load_config(on_disk)
  top = {path.name for path in on_disk.iterdir()}
  assert {name.split('/')[0] for name in names(folder)} == top  # and no lock any more
  without_times = lambda text: [line.split(',')[:2] for line in text.splitlines()]
  assert without_times((folder / 'metrics.csv').read_text()) == without_times((on_disk / 'metrics.csv').read_text())
  assert not list(tmp_path.iterdir()) and str(tmp_path) not in ''.join(said)
  assert f'Checkpoint     {folder}/checkpoints/8' in said
  assert f'Curves         {folder}/metrics.jsonl, or: {folder}/metrics.csv' in ''.join(said)


def test_a_run_that_ctrl_c_stopped_has_uploaded_its_rows_and_resumes(run, folder, on_disk):
  with pytest.raises(recovery.Interrupted, match=f'The last good checkpoint is {folder}/checkpoints/5'):
    run(folder, StopsAt(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
  assert [row['step'] for row in metrics.read(folder)] == [1, 2, 3, 4, 5]
  assert run(folder)[0] == 'Resuming after step 5 of 8.'
  assert_same_run(folder, on_disk)


def test_a_checkpoint_is_started_only_after_the_rows_up_to_it_are_uploaded(run, folder, monkeypatch):
  uploaded, save = {}, checkpoint.Checkpoints.save

  def look(checkpoints, state, *rest):
    uploaded[int(state.step)] = [row['step'] for row in metrics.read(folder)]
    save(checkpoints, state, *rest)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', look)
  run(folder)
  assert uploaded == {number: list(range(1, number + 1)) for number in (4, 8)}


def test_a_checkpoint_is_not_written_where_the_upload_before_it_fails_and_the_next_one_is(run, folder, on_disk, monkeypatch):
  upload, attempts = buckets.upload, []

  def failing(local, file):
    if local.name == 'metrics.jsonl':
      attempts.append(local)
      if len(attempts) == 1:
        raise OSError('503 try again later')
    upload(local, file)
  monkeypatch.setattr(buckets, 'upload', failing)
  saved, save = [], checkpoint.Checkpoints.save
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', lambda self, state, *rest: (saved.append(int(state.step)), save(self, state, *rest)))
  said = run(folder)
  assert saved == [8]
  assert (f'The checkpoint of step 4 is not written, because metrics.jsonl and other files could not be uploaded to '
          f'{folder} (503 try again later). Training continues; the next checkpoint is written as scheduled.') in said
  assert_same_run(folder, on_disk)


def test_files_that_cannot_be_uploaded_at_the_end_are_named_and_kept(run, folder, monkeypatch):
  upload = buckets.upload

  def failing(local, file):
    if '/profile/' in str(file):
      raise OSError('the network is unreachable')
    upload(local, file)
  monkeypatch.setattr(buckets, 'upload', failing)
  monkeypatch.setattr(bucket.Near, 'upload', lambda near, step: True)
  said = run(folder, profile=dict(start=4, steps=2))
  assert f'The last files of {folder} could not be uploaded (the network is unreachable).' in said[-1]
  near = Path(said[-1].split('They are in ')[1].split(' on this machine')[0])
  assert list(near.glob('profile/plugins/profile/*/*.xplane.pb'))
  shutil.rmtree(near.parent)


def test_a_trace_is_uploaded_whole_and_shown_with_its_address(run, folder, monkeypatch):
  monkeypatch.setattr(profile, 'installed', lambda program: program == 'xprof')
  said = run(folder, profile=dict(start=4, steps=2))
  assert f'Profile        xprof --logdir {folder}/profile' in said
  found = {name for name in names(folder) if name.startswith('profile/')}
  assert {name.split('/')[3] for name in found} == {'steps_4_to_5'} and len(found) == 2


# ---- killed ---------------------------------------------------------------------------------------------------------


def test_what_a_kill_between_rows_and_the_commit_of_a_checkpoint_leaves_is_not_used_and_removed(run, folder, on_disk):
  with pytest.raises(recovery.Interrupted):
    run(folder, StopsAt(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
  half = folder / 'checkpoints' / '6'
  (half / kept.COMMITTED).unlink()  # the last object of a checkpoint to be written
  buckets.write(half / 'params' / 'd' / 'of no whole checkpoint', b'', 0)
  assert [row['step'] for row in metrics.read(folder)][-1] == 6
  assert kept.complete(folder) == [4]
  assert checkpoint.restore_for_evaluation(folder)[1] == 4
  assert run(folder)[0] == 'Resuming after step 4 of 8.'
  assert not names(half)
  assert_same_run(folder, on_disk)


def test_a_damaged_checkpoint_is_named_set_aside_and_its_step_saved_again(run, folder, on_disk):
  run(folder)
  damage(data_file(folder, 8, 'params'))
  whole = names(folder / 'checkpoints' / '8')
  with pytest.raises(checksums.Damaged, match='params/.* differs from what was written'):
    checksums.check(folder / 'checkpoints' / '8')
  said = run(folder)
  assert f'The checkpoint {folder}/checkpoints/8 is damaged' in said[0] and 'using the one of step 4 instead' in said[0]
  assert names(folder / 'checkpoints' / 'damaged-8') == whole
  assert kept.complete(folder) == [8, 4]
  checksums.check(folder / 'checkpoints' / '8')
  assert_same_run(folder, on_disk)


def test_a_bucket_that_cannot_be_read_for_a_moment_is_no_damage(run, folder, monkeypatch):
  run(folder)
  whole = names(folder / 'checkpoints')
  def failing(*_, **__):
    raise OSError('503 try again later')
  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'restore', failing)
  with pytest.raises(recovery.NoCheckpoint, match=r'checkpoints/8 cannot be read, and is not damaged \(OSError: 503'):
    run(folder)
  assert names(folder / 'checkpoints') == whole


@pytest.mark.parametrize('calls', [1, 3, 5, 7])
def test_a_move_that_is_cut_off_loses_nothing_and_can_be_tried_again(folder, calls, monkeypatch):
  contents = {name: name.encode() for name in ('about/metadata', kept.COMMITTED, 'params/a', 'params/b')}
  for name, content in contents.items():
    buckets.write(folder / '6' / name, content, 0)
  from google.cloud import storage
  with monkeypatch.context() as patch:
    done = []
    def limited(original):
      def call(*args):
        if len(done) == calls:
          raise OSError('the machine is gone')
        done.append(original)
        return original(*args)
      return call
    patch.setattr(storage.Bucket, 'copy_blob', limited(storage.Bucket.copy_blob))
    patch.setattr(storage.Blob, 'delete', limited(storage.Blob.delete))
    with pytest.raises(OSError, match='the machine is gone'):
      buckets.move(folder / '6', folder / 'damaged-6', kept.COMMITTED)
  # orbax takes what lacks this file for half-written, and removes it.
  assert (folder / '6' / kept.COMMITTED).exists() and (folder / 'damaged-6' / kept.COMMITTED).exists()
  buckets.move(folder / '6', folder / 'damaged-6', kept.COMMITTED)
  assert not names(folder / '6')
  assert {name: (folder / 'damaged-6' / name).read_bytes() for name in names(folder / 'damaged-6')} == contents


def test_a_killed_process_resumes_and_ends_as_one_that_was_not(emulated_bucket, folder, tmp_path):
  """The command, ended by SIGKILL after a checkpoint, with its report and its messages."""
  config = Path(__file__).with_name('digits_config.py')
  environment = dict(emulated_bucket, JAX_PLATFORMS='cpu', TMPDIR=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'compiled'),
                     JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0', JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1')
  def start(workdir, steps=60):
    return subprocess.Popen([sys.executable, '-m', 'moejax.train', f'--config={config}:{steps}', f'--workdir={workdir}',
                             '--config.report.at=end'], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)
  killed = start(folder)
  while not kept.complete(folder) and killed.poll() is None:
    time.sleep(0.05)
  killed.kill()
  _, error = killed.communicate(timeout=300)
  assert killed.returncode == -signal.SIGKILL, error

  again, undisturbed = start(folder), start(tmp_path / 'run')
  said, error = again.communicate(timeout=300)
  assert again.returncode == 0, error
  assert undisturbed.wait(timeout=300) == 0
  assert 'Resuming after step' in said and str(tmp_path) not in said
  assert f'Report         {folder}/report/index.html' in said
  assert rows(folder) == rows(tmp_path / 'run')
  (_, number, *found), (_, _, *wanted) = map(checkpoint.restore_for_evaluation, (folder, tmp_path / 'run'))
  assert number == 60
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  page = (folder / 'report' / 'index.html').read_text()
  assert f'python -m moejax.evaluate --workdir={folder}' in page and str(tmp_path) not in page


# ---- checkpoints that move between a disk and a bucket --------------------------------------------------------------


def copy_down(folder, target):
  for name, blob in buckets.objects(folder).items():
    buckets.download(blob, target / name)


def test_a_run_copied_to_a_disk_is_verified_there_and_goes_on(run, folder, on_disk, tmp_path):
  with pytest.raises(recovery.Interrupted):
    run(folder, StopsAt(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
  copy_down(folder, tmp_path)
  about = tmp_path / 'checkpoints' / '5' / 'about' / 'metadata'
  content = about.read_bytes()
  about.write_bytes(content.replace(b'1', b'2'))
  assert checksums.damaged(tmp_path / 'checkpoints' / '5') == ['about/metadata differs from what was written']
  about.write_bytes(content)
  assert run(tmp_path)[0] == 'Resuming after step 5 of 8.'
  assert_same_run(tmp_path, on_disk)


def test_a_run_copied_to_a_bucket_is_verified_there(folder, on_disk):
  for path in on_disk.rglob('*'):
    if path.is_file():
      buckets.upload(path, folder / path.relative_to(on_disk).as_posix())
  assert_same_run(folder, on_disk)
  damage(data_file(folder, 8, 'average'))
  assert len(checksums.damaged(folder / 'checkpoints' / '8')) == 1
  assert checkpoint.restore_for_evaluation(folder)[1] == 4


# ---- the lock -------------------------------------------------------------------------------------------------------


@pytest.fixture
def process():
  """Another process of this machine."""
  process = subprocess.Popen(['sleep', '60'])
  yield process
  process.kill()
  process.wait()


def owned(folder, process, **changed):
  """`folder` as `process` would hold it."""
  owner = dict(lock._me(), process=process.pid, started=lock._started(process.pid)) | changed
  while True:
    with contextlib.suppress(buckets.Changed):  # by a run that holds it
      buckets.write(folder / lock.FILE, json.dumps(owner).encode(), buckets.read(folder / lock.FILE)[1])
      return


def take(folder):
  """The messages while the folder is locked and released."""
  said = []
  with lock.held(folder, said.append):
    lock.check(folder)
  return said


def test_a_folder_is_locked_and_released_without_a_trace(folder):
  assert take(folder) == take(folder) == [] and not names(folder)


def test_a_second_run_is_refused_with_the_process_and_host_of_the_first(folder, process):
  owned(folder, process, host='node-3')
  with pytest.raises(ConfigError, match=f'--workdir={folder} is in use: process {process.pid} on node-3 trains there'):
    take(folder)
  with pytest.raises(ConfigError, match='is in use'), lock.held(folder / 'another', print):
    take(folder / 'another')


def test_a_killed_run_of_this_machine_locks_nobody_out(folder, process):
  owned(folder, process)
  process.kill()
  process.wait()
  assert take(folder) == []


def test_a_silent_owner_on_another_machine_is_waited_for_and_then_replaced(folder, process, monkeypatch):
  monkeypatch.setattr(lock, '_SILENCE', 0.5)
  owned(folder, process, host='node-3', machine='another boot')
  said = take(folder)
  assert len(said) == 1 and f'Process {process.pid} on node-3 holds the lock of {folder}: waiting' in said[0]


def test_an_owner_on_another_machine_that_still_writes_its_lock_keeps_it(folder, process, monkeypatch):
  owned(folder, process, machine='another boot')
  monkeypatch.setattr(lock, '_SILENCE', 6.)
  timer = threading.Timer(1, owned, (folder, process), dict(machine='another boot'))
  timer.start()
  with pytest.raises(ConfigError, match='is in use'):
    take(folder)
  timer.join()


@pytest.mark.parametrize('silent', [False, True])
def test_of_many_that_start_at_the_same_moment_one_gets_the_folder(folder, process, monkeypatch, silent):
  """Also where all have waited for the same silent owner."""
  monkeypatch.setattr(lock, '_SILENCE', 0.5)
  if silent:
    owned(folder, process, machine='another boot')
  assert sorted(lock_race.outcomes(6, folder)) == ['held'] + ['refused'] * 5


@pytest.mark.parametrize('lost', [0, 1])
def test_the_owner_writes_its_lock_again_and_again(folder, monkeypatch, lost):
  """Also after a write of which it learned only that the connection was lost."""
  write, answers = buckets.write, ['lost'] * lost

  def written(file, content, generation):
    new = write(file, content, generation)
    if generation and answers:
      answers.pop()
      raise OSError('the connection was lost')
    return new
  monkeypatch.setattr(buckets, 'write', written)
  monkeypatch.setattr(lock, '_TOUCH', 0.05)
  with lock.held(folder, print):
    while answers:
      time.sleep(0.05)
    _, first = buckets.read(folder / lock.FILE)
    while buckets.read(folder / lock.FILE)[1] == first:
      time.sleep(0.05)
    lock.check(folder)
  assert not names(folder)


def test_a_write_whose_answer_was_lost_counts_as_written(folder, monkeypatch):
  write = buckets.write

  def repeated(file, content, generation):
    write(file, content, generation)
    return write(file, content, generation)  # as a client does that received no answer
  monkeypatch.setattr(buckets, 'write', repeated)
  assert take(folder) == []
  buckets.append(folder / 'lines', b'1\n')
  buckets.append(folder / 'lines', b'2\n')
  assert (folder / 'lines').read_bytes() == b'1\n2\n'


def test_a_run_whose_folder_was_taken_over_stops_and_writes_nothing_more(run, folder, process):
  state = {}

  def take_over():
    owned(folder, process, host='node-3')
    state.update({name: blob.generation for name, blob in buckets.objects(folder).items()})
  with pytest.raises(lock.Lost, match=f'{folder} does not belong to this run any more: process {process.pid} on node-3'):
    run(folder, StopsAt(4, take_over))
  found = {name: blob.generation for name, blob in buckets.objects(folder).items()}
  written = {name for name in found.keys() | state.keys() if found.get(name) != state.get(name)}
  assert all(name.startswith('checkpoints/4/') for name in written)  # which it was writing at that moment
  assert rows(folder)[-1]['step'] == 4


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_a_follower_measures_what_the_run_does_and_changes_nothing_but_its_own_file(run, folder, monkeypatch):
  run(folder)
  before = {name: blob.generation for name, blob in buckets.objects(folder).items()}
  monkeypatch.setattr(setup, 'prepare', lambda config: make_setup(**PARTS))
  said = []
  evaluate.follow(str(folder), say=said.append)
  by_the_run = {row['step']: {'test/accuracy': row['eval/test/accuracy']} for row in metrics.read(folder)
                if 'eval/test/accuracy' in row}
  assert {row['step']: row['metrics'] for row in log.read(folder)} == by_the_run and list(by_the_run) == [4, 8]
  after = {name: blob.generation for name, blob in buckets.objects(folder).items()}
  assert after.pop(log.FILE) and after == before
  assert f'written to {folder}/evaluations.jsonl' in said[2 + 2]
  again = []
  evaluate.follow(str(folder), say=again.append)
  assert len(again) == 1  # that all are evaluated


def test_a_follower_waits_for_a_run_and_never_takes_a_checkpoint_before_it_is_whole(folder, monkeypatch):
  from moejax.training import follow
  def write(name):
    buckets.write(folder / 'checkpoints' / name, b'x', 0)
  events = [lambda: workdir.claim(folder, make_setup().config), lambda: write('8/params/a'),
            lambda: write(f'8/{kept.COMMITTED}')]
  monkeypatch.setattr(follow, '_sleep', lambda seconds, interruption: events.pop(0)())
  evaluated = []
  follow.run(folder, evaluated.append, (), 30., lambda sentence: None)
  assert evaluated == [8] and not events


def test_lines_of_several_that_append_at_once_are_all_there(folder):
  threads = [threading.Thread(target=log.append, args=(folder, number, {}, {'loss': 0.})) for number in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert {row['step'] for row in log.read(folder)} == set(range(8))


# ---- folders that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, sentence', [
    ('gs://bucket', 'it names no folder in a bucket'), ('gs://nowhere/run', 'there is no bucket nowhere'),
    ('gs://bucket/a*', r'there is \* in its name'), (Path('gs://nowhere/run'), 'there is no bucket nowhere')])
def test_an_address_that_cannot_be_the_folder_of_a_run_is_refused(name, sentence):
  with pytest.raises(ConfigError, match=f'--workdir=gs://?.* cannot be the folder of a run: {sentence}'):
    workdir.find(name)


def test_without_credentials_the_command_ends_at_once_in_a_sentence(emulated_bucket, tmp_path):
  environment = {name: value for name, value in emulated_bucket.items() if 'STORAGE' not in name}
  environment |= dict(HOME=str(tmp_path), NO_GCE_CHECK='true')
  done = subprocess.run([sys.executable, '-m', 'moejax.evaluate', '--workdir=gs://bucket/run'], env=environment,
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1] == (
      '--workdir=gs://bucket/run cannot be the folder of a run: there are no credentials for Google Cloud. Run gcloud '
      'auth application-default login, or use a machine with a service account.')


def test_a_folder_that_holds_another_run_is_refused_and_not_touched(run, folder):
  buckets.write(folder / 'metrics.jsonl', b'{"step": 1}\n', 0)
  with pytest.raises(ConfigError, match=f'{folder} holds checkpoints or metrics but no config.json'):
    run(folder)
  assert names(folder) == {'metrics.jsonl'}


def test_the_checksum_of_a_bucket_is_the_md5_of_the_content(folder):
  import hashlib
  buckets.write(folder / 'a', b'content', 0)
  checksums.write(folder)
  expected = base64.b64encode(hashlib.md5(b'content').digest()).decode()
  assert json.loads((folder / 'checksums.json').read_text())['files'] == {'a': [7, expected]}
