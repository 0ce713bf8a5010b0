"""One run at a time writes into a folder; a killed run locks nobody out.

Owners on this machine are real processes; for those on others, the lock file is written, and touched, here.
"""
import json
import os
import threading

import lock_race
import pytest

from moejax.config import ConfigError
from moejax.training.durability import lock


def owned(folder, process, **changed):
  """`folder` as `process` would hold it."""
  owner = dict(lock._me(), process=process.pid, started=lock._started(process.pid)) | changed
  (folder / lock.FILE).write_text(json.dumps(owner))


def take(folder):
  """The messages while the folder is locked and released."""
  said = []
  with lock.held(folder, said.append):
    assert json.loads((folder / lock.FILE).read_text())['process'] == os.getpid()
  return said


def test_a_folder_is_created_locked_and_released_without_a_trace(tmp_path):
  for _ in range(2):
    assert take(tmp_path / 'runs' / 'a') == []
    assert os.listdir(tmp_path / 'runs' / 'a') == []


def test_the_folder_of_a_run_that_trains_is_refused_with_its_process_and_host(tmp_path, process):
  owned(tmp_path, process, host='node-3')
  before = (tmp_path / lock.FILE).read_text()
  with pytest.raises(ConfigError, match=f'in use: process {process.pid} on node-3 trains there. Choose another --work'):
    take(tmp_path)
  assert (tmp_path / lock.FILE).read_text() == before


def test_a_run_does_not_start_twice_in_one_process(tmp_path):
  with lock.held(tmp_path, print), pytest.raises(ConfigError, match=f'process {os.getpid()} on'):
    take(tmp_path)


def test_an_error_releases_the_folder(tmp_path):
  with pytest.raises(ZeroDivisionError), lock.held(tmp_path, print):
    raise ZeroDivisionError
  assert take(tmp_path) == []


@pytest.mark.parametrize('waited_for', [True, False])
def test_the_folder_of_a_killed_run_is_taken_over_silently(tmp_path, process, waited_for):
  owned(tmp_path, process)
  process.kill()
  if waited_for:
    process.wait()
  else:
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table of processes
  assert take(tmp_path) == []


def test_a_process_that_reuses_the_id_of_a_killed_one_is_not_the_owner(tmp_path, process):
  owned(tmp_path, process, started='1')
  assert take(tmp_path) == []


@pytest.mark.parametrize('content', ['', '{"host": "a', '{}', '[1]', '\0' * 50])
def test_a_half_written_lock_holds_nothing(tmp_path, content):
  (tmp_path / lock.FILE).write_text(content)
  assert take(tmp_path) == []


def test_only_one_of_many_takes_over_the_folder_of_a_killed_run(tmp_path, process):
  owned(tmp_path, process)
  process.kill()
  process.wait()
  assert sorted(lock_race.outcomes(8, tmp_path)) == ['held'] + ['refused'] * 7


# ---- other machines -------------------------------------------------------------------------------------------------


def test_a_silent_owner_on_another_machine_is_waited_for_and_then_replaced(tmp_path, process, monkeypatch):
  monkeypatch.setattr(lock, '_SILENCE', 0.3)
  owned(tmp_path, process, host='node-3', machine='another boot')
  said = take(tmp_path)
  assert len(said) == 1 and f'Process {process.pid} on node-3 holds the lock of {tmp_path}: waiting' in said[0]


def test_an_owner_on_another_machine_that_still_touches_its_lock_keeps_it(tmp_path, process, monkeypatch):
  owned(tmp_path, process, machine='another boot')
  monkeypatch.setattr(lock, '_SILENCE', 6.)
  monkeypatch.setattr(lock, '_TOUCH', 0.05)
  ended = threading.Event()
  alive = threading.Thread(target=lock._FileLock(tmp_path / lock.FILE).touch, args=(ended,))
  alive.start()
  with pytest.raises(ConfigError, match='is in use'):
    take(tmp_path)
  ended.set()
  alive.join()


def test_a_run_whose_folder_was_deleted_ends_without_an_error(tmp_path):
  folder = tmp_path / 'run'
  with lock.held(folder, print):
    (folder / lock.FILE).unlink()
    folder.rmdir()
  assert not folder.exists()


# ---- folders that cannot be written to ------------------------------------------------------------------------------


@pytest.mark.parametrize('error, sentence', [(PermissionError(13, 'Permission denied'), 'permission denied'),
                                             (OSError(30, 'Read-only file system'), 'read-only file system'),
                                             (OSError(122, 'Disk quota exceeded'), 'disk quota exceeded')])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, error, sentence):
  def refuse(*_):
    raise error
  monkeypatch.setattr(lock, '_write', refuse)  # root may write everywhere
  with pytest.raises(ConfigError, match=f'cannot be the folder of a run: {sentence}. Choose another --workdir'):
    take(tmp_path)
