"""A run resumes over more or fewer devices: the same batches in the same order, and the same losses.

Oracle: an uninterrupted run over one device. Over several processes: tests/parallel/test_train_in_processes.py.
"""
import functools
import os
import signal

import numpy as np
import pytest
from training_fakes import TinyPipeline, make_setup

from moejax.training import loop, metrics, step
from moejax.training.durability import stop_reasons

STEPS = 10
PARTS = dict(training=dict(steps=STEPS))


class Recorded(TinyPipeline):
  """Records the numbers of the batches that are read, and interrupts the run at one of them."""

  def __init__(self, interrupt_at=None):
    super().__init__()
    self.read, self.interrupt_at = [], interrupt_at

  def batch(self, number):
    self.read.append(number)
    if number == self.interrupt_at:
      os.kill(os.getpid(), signal.SIGINT)
    return super().batch(number)


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """All set-ups here over as many devices differ in their data alone."""
  make = step.make_train_step
  compiled = functools.cache(lambda devices: make(make_setup(devices, **PARTS)))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, 'make_train_step', lambda setup: compiled(setup.mesh.size))
    yield


def go_on(folder, devices, interrupt_at=None):
  """Trains over so many devices; returns the numbers of the batches."""
  pipeline = Recorded(interrupt_at)
  setup = make_setup(devices, pipeline, **PARTS)
  if interrupt_at is None:
    loop.train(setup, folder, lambda line: None)
  else:
    with pytest.raises(stop_reasons.Interrupted):
      loop.train(setup, folder, lambda line: None)
  return pipeline.read


def losses(folder):
  return [row['train/loss'] for row in metrics.read(folder)]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  assert go_on(folder, 1) == list(range(STEPS))
  return losses(folder)


@pytest.mark.parametrize('devices', [(1, 8), pytest.param((8, 4, 2, 1), marks=pytest.mark.slow)])
def test_a_run_continues_over_any_number_of_devices(tmp_path, undisturbed, devices):
  *stops, last = zip(devices, (1, 3, 6, None))
  read = [number for count, interrupt_at in stops for number in go_on(tmp_path, count, interrupt_at)]
  assert read + go_on(tmp_path, last[0]) == list(range(STEPS))
  assert len(undisturbed) == STEPS
  np.testing.assert_allclose(losses(tmp_path), undisturbed, rtol=1e-5)  # sums over the batch in another order
