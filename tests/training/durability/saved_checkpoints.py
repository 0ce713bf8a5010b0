"""Checkpoints of a tiny run, saved and restored without a loop."""
import functools

import jax
import numpy as np
from training_fakes import make_setup

from moejax.training import step
from moejax.training.durability import checkpoint

DATA = {'examples': '64', 'a.txt': '10 bytes of checksum 01234567'}


@functools.cache
def setup_of(devices=1):
  return make_setup(devices, training=dict(average=0.5))


@functools.cache
def state_of(devices=1):
  return step.init_state(setup_of(devices))


def state_at(number, devices=1):
  """A state in which every float depends on its step."""
  return jax.tree.map(lambda x: x + x.dtype.type(number), state_of(devices))


def opened(folder, said=None, data=DATA, **options):
  return checkpoint.Checkpoints(folder, setup_of().config, checkpoint.CheckpointConfig(**options),
                                (said if said is not None else []).append, data)


def batches():
  return setup_of().pipeline.train(0)


def after(count):
  iterator = batches()
  for _ in range(count):
    next(iterator)
  return iterator


def save(folder, *numbers, rows=None, **options):
  with opened(folder, **options) as checkpoints:
    for number in numbers:
      checkpoints.save(state_at(number), after(number), (rows or {}).get(number, {}))


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def restore(folder, devices=1):
  said, iterator = [], batches()
  with opened(folder, said) as checkpoints:
    state = checkpoints.restore(step.abstract_state(setup_of(devices)), iterator)
  return state, iterator, said
