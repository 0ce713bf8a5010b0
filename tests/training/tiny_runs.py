"""Runs of the tiny model, and how two of them are compared."""
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fakes import make_setup

from moejax.functional import flatten
from moejax.training import loop, metrics, step
from moejax.training.durability import restore

STEPS = 8
PARTS = dict(evaluate=True, evaluation=dict(every=4), training=dict(steps=STEPS, average=0.9))


@contextlib.contextmanager
def compiled_once():
  """Within this context all set-ups share the compiled step and the first state: those of `PARTS` differ in data alone."""
  setup = make_setup(**PARTS)
  train_step, first = step.make_train_step(setup), step.init_state(setup)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, 'make_train_step', lambda setup: train_step)
    patch.setattr(step, 'init_state', lambda setup: jax.tree.map(jnp.copy, first))
    yield


def run(folder, pipeline=None, **sections):
  """Trains in `folder`; returns the last row and the messages."""
  said = []
  row = loop.train(make_setup(pipeline=pipeline, **{**PARTS, **sections}), folder, said.append)
  return row, said


def crash():
  raise RuntimeError('power failure')


def rows(folder):
  return [metrics.repeatable(row) for row in metrics.read(folder)]


def final_params(folder):
  """The parameters of the last checkpoint, by path."""
  return flatten(restore.restore_for_evaluation(folder)[2])


def assert_same_run(folder, expected):
  """Every float of every row and of the last checkpoint is the same, to the last bit; each step is there once."""
  assert rows(folder) == rows(expected)
  (_, number, *found), (_, _, *wanted) = map(restore.restore_for_evaluation, (folder, expected))
  assert number == STEPS
  for a, b in zip(map(flatten, found), map(flatten, wanted)):
    assert a.keys() == b.keys()
    for path, value in a.items():
      np.testing.assert_array_equal(value, b[path])
