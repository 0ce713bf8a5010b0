"""Every implementation of attention against the plain one, and the plain one against a loop over single queries."""
import contextlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_masks import FIELDS, masks
from hypothesis import Phase, given, settings, strategies as st

from moejax.kernels.target import interpreted
from moejax.layers.attend import attend, chunked


# Every example is a program to compile: making a failing one smaller would take minutes.
PHASES = Phase.explicit, Phase.generate


def draw_arguments(data, tests):
  """Arrays and other arguments of `attend` that the implementation under test takes."""
  B, N, R = (data.draw(st.integers(1, 2)) for _ in range(3))
  S, T = data.draw(st.sampled_from(tests.lengths))
  k, v = data.draw(st.sampled_from(tests.widths))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  arrays = dict(queries=rng.normal(size=(B, S, N * R, k)), keys=rng.normal(size=(B, T, N, k)),
                values=rng.normal(size=(B, T, N, v)))
  has = lambda what: what in tests.can and data.draw(st.booleans())
  others: dict[str, Any] = dict(scale=0.7, cap=data.draw(st.sampled_from([0.5, 3.])) if has('cap') else None)
  if has('bias') and (others['cap'] is None or tests.bias_after_cap):
    arrays['bias'] = rng.normal(size=(data.draw(st.sampled_from([1, B])), data.draw(st.sampled_from([1, N * R])), S, T))
  if has('sinks'):
    arrays['sinks'] = rng.normal(size=N * R)
  if has('mask'):
    others['mask'] = data.draw(masks(B, S, T, tests.fields))
  return arrays, others


def value_and_gradients(arrays, others, implementation, dtype):
  """The output, and the gradients of a weighted sum of it by every array."""
  arrays = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
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
  dtype = 'float64'
  tolerance = 1e-12  # sums of a few dozen terms of size 1, in another order
  can = ('bias', 'sinks', 'cap', 'mask')
  bias_after_cap = True
  fields = FIELDS
  lengths = (1, 7), (7, 7), (8, 3)
  widths = (4, 4), (6, 2)
  examples = 10

  def __init_subclass__(cls):
    cls.test_values_and_gradients_equal_those_of_plain_attention = settings(max_examples=cls.examples, phases=PHASES)(
        given(data=st.data())(cls.check))

  def target(self):
    """The context in which the implementation runs here."""
    return contextlib.nullcontext()

  def check(self, data):
    arrays, others = draw_arguments(data, self)
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


class TestSplash(AttendTests):
  name = 'splash'
  dtype = 'float32'
  tolerance = 3e-5  # gradients sum 256 products of size 1: float32's 1e-7 times the square root of 256 products of 10
  can = ('sinks', 'cap', 'mask')
  fields = ('segments', 'window', 'causal')
  lengths = (128, 128), (128, 256)
  widths = (8, 8),
  examples = 3

  def target(self):
    return interpreted('tpu')


if importlib.util.find_spec('tokamax') is not None:
  class TestTokamax(AttendTests):
    name = 'tokamax'
    dtype = 'float32'
    tolerance = 1e-5  # sums of a dozen terms of size 1 in float32
    can = ('bias', 'cap', 'mask')
    bias_after_cap = False


def attend_to_one_query_at_a_time(queries, keys, values, bias=None, sinks=None, *, scale, cap, mask=None):
  """The definition, in float64."""
  (B, S, H, _), T, v = queries.shape, keys.shape[1], values.shape[-1]
  dense = None if mask is None else mask.dense(S, T)
  seen = np.broadcast_to(True if dense is None else dense, (B, 1, S, T))[:, 0]
  bias = np.broadcast_to(0. if bias is None else bias, (B, H, S, T))
  out = np.zeros((B, S, H, v))
  for b, s, h in np.ndindex(B, S, H):
    head = h // (H // keys.shape[2])
    logits = keys[b, :, head] @ queries[b, s, h] * scale
    logits = (logits if cap is None else cap * np.tanh(logits / cap)) + bias[b, h, s]
    shares = np.where(seen[b, s], np.exp(logits), 0)
    total = shares.sum() + (0 if sinks is None else np.exp(sinks[h]))
    out[b, s, h] = shares @ values[b, :, head] / total if total else values[b, :, head].mean(0)
  return out


@settings(max_examples=10, phases=PHASES)
@given(data=st.data())
def test_plain_attention_equals_its_definition(data):
  arrays, others = draw_arguments(data, AttendTests)
  with jax.enable_x64(True):
    run = jax.jit(lambda arrays, mask: attend(**arrays, **{**others, 'mask': mask}, implementation='plain'))
    got = run({name: jnp.asarray(array) for name, array in arrays.items()}, others.get('mask'))
  np.testing.assert_allclose(got, attend_to_one_query_at_a_time(**arrays, **others), atol=1e-12)


def test_dropout_is_what_the_function_of_weights_does():
  rng = np.random.default_rng(0)
  queries, keys, values = (jnp.float32(rng.normal(size=(2, 3, 2, 4))) for _ in range(3))
  keep = jnp.asarray(rng.random((2, 2, 3, 3)) < 0.5)
  logits = jnp.einsum('bshk,bthk->bhst', queries, keys)
  expected = jnp.einsum('bhst,bthk->bshk', jax.nn.softmax(logits) * keep, values)
  np.testing.assert_allclose(attend(queries, keys, values, scale=1., drop=lambda weights: weights * keep), expected,
                             atol=1e-6)  # sums of three terms in float32


def test_weights_are_float32_and_outputs_have_the_dtype_of_values():
  x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
  seen = []
  out = attend(x, x, x, scale=1., drop=lambda weights: (seen.append(weights.dtype), weights)[1])
  assert out.dtype == jnp.bfloat16 and seen == [jnp.float32]
  assert attend(x, x, x, scale=1., implementation='chunked').dtype == jnp.bfloat16
