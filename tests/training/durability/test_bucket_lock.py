"""The lock of a folder in a bucket: of several runs exactly one holds it, and a run that lost it writes nothing more."""
import contextlib
import json
import threading
import time

import lock_race
import pytest
from bucket_runs import names
from tiny_runs import rows
from training_fakes import StopsAt

from moejax import buckets
from moejax.config import ConfigError
from moejax.training.durability import lock

pytestmark = [pytest.mark.gcs, pytest.mark.usefixtures('emulated_bucket')]


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
  with pytest.raises(lock.LockLost, match=f'{folder} does not belong to this run any more: process {process.pid} on node-3'):
    run(folder, StopsAt(4, take_over))
  found = {name: blob.generation for name, blob in buckets.objects(folder).items()}
  written = {name for name in found.keys() | state.keys() if found.get(name) != state.get(name)}
  assert all(name.startswith('checkpoints/4/') for name in written)  # which it was writing at that moment
  assert rows(folder)[-1]['step'] == 4
