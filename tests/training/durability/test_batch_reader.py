"""Batches that are late, never arrive, or cannot be read: a message, or the end of the run, but never a hang."""
import threading
import time
from types import SimpleNamespace

import pytest

from moejax.training.durability import batch_reader
from moejax.training.durability.recovery import RecoveryConfig


class Source:
  """Batches 0, 1, ...; `trouble` holds what is called before one is given."""

  def __init__(self, **trouble):
    self.number, self.trouble = 0, trouble

  def __next__(self):
    number, self.number = self.number, self.number + 1
    self.trouble.get(f'at_{number}', lambda: None)()
    return {'number': number}

  def get_state(self):
    return {'next': self.number}

  def set_state(self, state):
    self.number = state['next']


@pytest.fixture
def hang():
  """Waits until the test is over."""
  over = threading.Event()
  yield over.wait
  over.set()


def batches(source, said=None, signal=None, **options):
  options = RecoveryConfig(**options)
  return batch_reader.BatchReader(source, options, SimpleNamespace(signal=signal), (said if said is not None else []).append)


def test_batches_arrive_in_order_and_the_position_is_after_the_last():
  with batches(Source()) as ahead:
    ahead.set_state({'next': 5})
    assert [ahead.next(step)['number'] for step in (1, 2)] == [5, 6]
    assert ahead.get_state() == {'next': 7}


def test_a_late_batch_is_reported_and_arrives():
  said = []
  with batches(Source(at_1=lambda: time.sleep(0.5)), said, slow_data=0.2) as ahead:
    assert [ahead.next(step)['number'] for step in (1, 2)] == [0, 1]
  assert said and said[0].startswith('Step 2: waited') and 'config.recovery.data_timeout' in said[0]


def test_a_batch_that_never_arrives_ends_the_wait_at_the_position_before_it(hang):
  with batches(Source(at_1=hang), data_timeout=0.3) as ahead:
    ahead.next(1)
    with pytest.raises(batch_reader.NoBatch, match='batch of step 2 did not arrive within 0 s') as end:
      ahead.next(2)
    assert end.value.__cause__ is None
    assert ahead.get_state() == {'next': 1}


def test_an_unreadable_batch_gives_its_error_and_the_position_before_it():
  def fail():
    raise OSError('the disk is gone')
  with batches(Source(at_1=fail)) as ahead:
    ahead.next(1)
    with pytest.raises(batch_reader.NoBatch, match='reading the batch of step 2 failed: OSError: the disk is gone') as end:
      ahead.next(2)
    assert isinstance(end.value.__cause__, OSError)
    assert ahead.get_state() == {'next': 1}


def test_an_interrupted_run_does_not_wait(hang):
  with batches(Source(at_0=hang), signal=15) as ahead:
    began = time.monotonic()
    with pytest.raises(batch_reader.NoBatch):
      ahead.next(1)
  assert time.monotonic() - began < 10
