"""Runs whose folder is in a bucket give, file by file and bit by bit, what runs in a folder give.

The bucket is an emulator's; the oracle is the same run in a folder of this machine.
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import digits_config
import jax
import numpy as np
import pytest
from bucket_runs import names
from tiny_runs import assert_same_run, rows
from training_fakes import StopsAt

from moejax import buckets
from moejax.config import ConfigError
from moejax.training import metrics, profile, workdir
from moejax.training.durability import checkpoint, restore, retention, staging, stop_reasons

pytestmark = [pytest.mark.gcs, pytest.mark.usefixtures('emulated_bucket')]


def test_a_run_is_bit_for_bit_that_of_a_folder_and_leaves_the_same_files(run, folder, on_disk, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  said = run(folder)
  assert_same_run(folder, on_disk)
  assert retention.complete(folder) == retention.complete(on_disk) == [8, 4]
  assert workdir.load_config(folder) == workdir.load_config(on_disk)
  top = {path.name for path in on_disk.iterdir()}
  assert {name.split('/')[0] for name in names(folder)} == top  # and no lock any more
  without_times = lambda text: [line.split(',')[:2] for line in text.splitlines()]
  assert without_times((folder / 'metrics.csv').read_text()) == without_times((on_disk / 'metrics.csv').read_text())
  assert not list(tmp_path.iterdir()) and str(tmp_path) not in ''.join(said)
  assert f'Checkpoint     {folder}/checkpoints/8' in said
  assert f'Curves         {folder}/metrics.jsonl, or: {folder}/metrics.csv' in ''.join(said)


def test_a_run_that_ctrl_c_stopped_has_uploaded_its_rows_and_resumes(run, folder, on_disk):
  with pytest.raises(stop_reasons.Interrupted, match=f'The last good checkpoint is {folder}/checkpoints/5'):
    run(folder, StopsAt(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
  assert [row['step'] for row in metrics.read(folder)] == [1, 2, 3, 4, 5]
  assert run(folder)[0] == 'Resuming after step 5 of 8.'
  assert_same_run(folder, on_disk)


def test_a_killed_process_resumes_and_ends_as_one_that_was_not(emulated_bucket, folder, tmp_path):
  """The command, ended by SIGKILL after a checkpoint, with its report and its messages."""
  config = digits_config.__file__
  environment = dict(emulated_bucket, JAX_PLATFORMS='cpu', TMPDIR=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'compiled'),
                     JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0', JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1')
  def start(workdir, steps=60):
    return subprocess.Popen([sys.executable, '-m', 'moejax.train', f'--config={config}:{steps}', f'--workdir={workdir}',
                             '--config.report.at=end'], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)
  killed = start(folder)
  while not retention.complete(folder) and killed.poll() is None:
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
  (_, number, *found), (_, _, *wanted) = map(restore.restore_for_evaluation, (folder, tmp_path / 'run'))
  assert number == 60
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  page = (folder / 'report' / 'index.html').read_text()
  assert f'python -m moejax.evaluate --workdir={folder}' in page and str(tmp_path) not in page


# ---- uploads --------------------------------------------------------------------------------------------------------


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


@pytest.fixture
def traces(monkeypatch):
  """Traces without jax's profiler, which ends a process that has compiled for a TPU: two files, named as it names them."""
  begun = []

  def stop():
    path = Path(begun.pop()) / 'plugins/profile/2026_01_01'
    path.mkdir(parents=True)
    for kind in ('xplane.pb', 'trace.json.gz'):
      (path / f'host.{kind}').write_bytes(b'trace')
  monkeypatch.setattr(jax.profiler, 'start_trace', begun.append)
  monkeypatch.setattr(jax.profiler, 'stop_trace', stop)


@pytest.mark.usefixtures('traces')
def test_files_that_cannot_be_uploaded_at_the_end_are_named_and_kept(run, folder, monkeypatch):
  upload = buckets.upload

  def failing(local, file):
    if '/profile/' in str(file):
      raise OSError('the network is unreachable')
    upload(local, file)
  monkeypatch.setattr(buckets, 'upload', failing)
  monkeypatch.setattr(staging.StagingFolder, 'upload', lambda staging, step: True)
  said = run(folder, profile=dict(start=4, steps=2))
  assert f'The last files of {folder} could not be uploaded (the network is unreachable).' in said[-1]
  staged = Path(said[-1].split('They are in ')[1].split(' on this machine')[0])
  assert list(staged.glob('profile/plugins/profile/*/*.xplane.pb'))
  shutil.rmtree(staged.parent)


@pytest.mark.usefixtures('traces')
def test_a_trace_is_uploaded_whole_and_shown_with_its_address(run, folder, monkeypatch):
  monkeypatch.setattr(profile, 'installed', lambda program: program == 'xprof')
  said = run(folder, profile=dict(start=4, steps=2))
  assert f'Profile        xprof --logdir {folder}/profile' in said
  found = {name for name in names(folder) if name.startswith('profile/')}
  assert {name.split('/')[3] for name in found} == {'steps_4_to_5'} and len(found) == 2


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
