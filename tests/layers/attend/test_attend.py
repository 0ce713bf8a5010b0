"""Every implementation of attention against the plain one, and the plain one against a loop over single queries."""
import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_masks import FIELDS, masks
from hypothesis import given, settings, strategies as st

from moejax.kernels.choice import CannotRun
from moejax.kernels.target import interpreted
from moejax.layers.attend import Mask, attend, chunked, explain
from moejax.layers.attend.choice import REASONS


def draw_arrays(data, tests):
  """Arguments of `attend` with what the implementation under test can do."""
  B, N, R = (data.draw(st.integers(1, 2)) for _ in range(3))
  S, T = data.draw(st.sampled_from(tests.lengths))
  k, v = data.draw(st.sampled_from(tests.widths))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  normal = lambda *shape: rng.normal(size=shape)
  arrays = dict(queries=normal(B, S, N * R, k), keys=normal(B, T, N, k), values=normal(B, T, N, v))
  has = lambda what: what in tests.can and data.draw(st.booleans())
  if has('bias'):
    arrays['bias'] = normal(data.draw(st.sampled_from([1, B])), data.draw(st.sampled_from([1, N * R])), S, T)
  if has('sinks'):
    arrays['sinks'] = normal(N * R)
  others = dict(scale=0.7, cap=data.draw(st.sampled_from([0.5, 3.])) if has('cap') else None)
  if has('mask'):
    others['mask'] = data.draw(masks(B, S, T, tests.fields))
  return arrays, others


def value_and_gradients(arrays, others, implementation, dtype):
  """Outputs, and the gradients of a weighted sum of them by every array."""
  arrays = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}
  shape = (*arrays['queries'].shape[:3], arrays['values'].shape[-1])
  weights = jnp.asarray(np.random.default_rng(7).normal(size=shape), dtype)

  def total(arrays, mask):
    out = attend(**arrays, **{**others, 'mask': mask}, implementation=implementation)
    return (out * weights).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays, others.get('mask'))
  return dict(gradients, out=out)


class AttendTests:
  """Subclasses name the implementation, and what it can do."""
  name: str
  platform: Any = None  # of kernels that are interpreted here
  dtype = 'float64'
  tolerance = 1e-12  # of sums of a few dozen terms of size 1, in another order
  can = ('bias', 'sinks', 'cap', 'mask')
  fields = FIELDS
  lengths = (1, 7), (7, 7), (8, 3), (5, 12)
  widths = (4, 4), (6, 2)
  examples = 12

  def __init_subclass__(cls):
    cls.test_values_and_gradients_equal_those_of_plain_attention = settings(max_examples=cls.examples, phases=__import__('hypothesis').Phase.__members__ and [__import__('hypothesis').Phase.generate])(
        given(data=st.data())(cls.check))

  def target(self):
    """The context in which the implementation runs here."""
    return interpreted(self.platform) if self.platform else contextlib.nullcontext()

  def check(self, data):
    arrays, others = draw_arrays(data, self)
    with jax.enable_x64(True):
      expected = value_and_gradients(arrays, others, 'plain', 'float64')
      with jax.enable_x64(self.dtype == 'float64'), self.target():
        got = value_and_gradients(arrays, others, self.name, self.dtype)
    for name, array in expected.items():
      np.testing.assert_allclose(got[name], array, atol=self.tolerance, rtol=self.tolerance, err_msg=name)


class TestChunked(AttendTests):
  name = 'chunked'

  @contextlib.contextmanager
  def target(self):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(chunked, 'QUERIES', 3)
      patch.setattr(chunked, 'KEYS', 4)
      yield
