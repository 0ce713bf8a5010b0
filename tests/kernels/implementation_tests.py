"""Tests for every implementation of the grouped matmul, in one class that each test file inherits.

The oracles are numpy loops over single rows in float64, their derivatives written out by hand. Rows after the last group
hold NaN in every comparison, in inputs and in cotangents.
"""
import contextlib
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings, strategies as st

from moejax.kernels import Routes, Weights, expert_block, grouped_matmul
from moejax.kernels.expert_block import Activation
from moejax.kernels.target import interpreted

class ImplementationTests:
  """Subclasses name the implementation, and the shapes and dtypes it can run; `examples` bounds slow interpreted runs.

  N tokens choose K experts of E each, so M = N*K rows.
  """
  name: str
  platform = None  # of kernels that are interpreted here
  dtypes = ('float32', 'bfloat16')
  N, K, E, D, F = 60, 2, 5, 4, 6
  examples = 15
  activations = get_args(Activation)

  def __init_subclass__(cls):
    M = cls.N * cls.K
    for name, check in [('grouped_matmul', cls.check_grouped_matmul), ('expert_block', cls.check_expert_block)]:
      test = _for_any_group_sizes(check, M, cls.E)
      for pattern in [0, 0, M, 0, 0], [0, 0, 0, 0, 0], [1, 0, M // 3, M // 3 + 1, 7]:
        test = example(sizes=pattern)(test)
      setattr(cls, f'test_{name}_equals_the_loop_for_any_group_sizes', settings(max_examples=cls.examples)(test))

  def target(self):
    """The context in which the implementation runs here."""
    return interpreted(self.platform) if self.platform else contextlib.nullcontext()

  def check_grouped_matmul(self, group_sizes):
    dtype = self.dtypes[0]
    x, w, dy = matmul_data(self, dtype)
    x, dy = poison(x, group_sizes), poison(dy, group_sizes)
    got = self._matmul_and_gradients()(x, w, jnp.array(group_sizes, jnp.int32), dy)
    for a, b in zip(got, matmul_loop(x, w, group_sizes, dy)):
      close(a, b, dtype)

  def check_expert_block(self, group_sizes, activation='swiglu', dtype=None, biases=False, scatter=False):
    dtype = dtype or self.dtypes[0]
    x, weights, routes, dy = block_data(self, group_sizes, activation, dtype, biases)
    run = self._block_and_gradients(activation)
    got = run(x, weights, routes._replace(position=None) if scatter else routes, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(block_loop(x, weights, routes, dy, activation)), strict=True):
      close(a, b, dtype)

  def _matmul_and_gradients(self):
    def run(x, w, group_sizes, dy):
      y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=self.name), x, w)
      return y, *pull(dy)
    return self._jitted('matmul', run)

  def _block_and_gradients(self, activation):
    def run(x, weights, routes, dy):
      def block(x, weights, weight):
        return expert_block(x, weights, routes._replace(weight=weight), activation=activation, implementation=self.name)
      y, pull = jax.vjp(block, x, weights, routes.weight)
      return y, *pull(dy)
    return self._jitted(activation, run)

  def _jitted(self, key, function):
    # One compiled function for all examples: hypothesis makes a new `self` for each.
    cache = vars(type(self)).get('_cache')
    if cache is None:
      cache = type(self)._cache = {}
    compiled = cache.setdefault(key, jax.jit(function))

    def run(*arguments):
      with self.target():
        return compiled(*arguments)
    return run

  def test_expert_block_has_every_activation_with_biases(self):
    for activation in self.activations:
      self.check_expert_block(uneven(self), activation, biases=True)

  def test_expert_block_sums_tokens_with_any_number_of_rows(self):
    """Without positions the sums are scattered."""
    self.check_expert_block(uneven(self), 'gelu', scatter=True)

  def test_expert_block_in_bfloat16(self):
    self.check_expert_block(uneven(self), 'swiglu', dtype='bfloat16')

  def test_rows_after_the_last_group_and_matrices_of_empty_groups_get_exact_zeros(self):
    sizes = uneven(self)
    x, w, dy = matmul_data(self, self.dtypes[0])
    x, dy = poison(x, sizes), poison(dy, sizes)
    y, dx, dw = self._matmul_and_gradients()(x, w, jnp.array(sizes, jnp.int32), dy)
    assert not y[sum(sizes):].any() and not dx[sum(sizes):].any()
    assert not dw[1].any() and not dw[3].any() and dw[2].any()

  def test_bfloat16_is_rounded_once_at_the_end(self):
    x, w, dy = matmul_data(self, 'bfloat16')
    sizes = uneven(self)
    x, dy = poison(x, sizes), poison(dy, sizes)
    got = self._matmul_and_gradients()(x, w, jnp.array(sizes, jnp.int32), dy)
    for a, b in zip(got, matmul_loop(x, w, sizes, dy)):
      assert a.dtype == jnp.bfloat16
      # Rounding to 8 significant bits is off by at most 2^-8 of the value; the rest is float32 accumulation.
      np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=2**-16 * np.abs(b).max() + 1e-30)

  def test_bfloat16_products_are_summed_in_float32(self):
    # 256 + 1 is 256 in bfloat16, so a bfloat16 sum of these four would be 0 and not 2.
    x = jnp.zeros((1, self.D), jnp.bfloat16).at[0, :4].set(jnp.array([256, 1, 1, -256]))
    with self.target():
      y = grouped_matmul(x, jnp.ones((1, self.D, self.F), jnp.bfloat16), jnp.array([1]), implementation=self.name)
    assert y.tolist() == [[2.] * self.F]

  def test_no_rows_give_no_outputs_and_zero_gradients(self):
    dtype = self.dtypes[0]
    w = jnp.ones((self.E, self.D, self.F), dtype)
    with self.target():
      y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.zeros(self.E, jnp.int32), implementation=self.name),
                        jnp.ones((0, self.D), dtype), w)
      dx, dw = pull(y)
    assert y.shape == (0, self.F) and dx.shape == (0, self.D) and dw.shape == w.shape and not dw.any()


def _for_any_group_sizes(check, num_rows, num_groups):
  @given(sizes=group_sizes(num_rows, num_groups))
  def test(self, sizes):
    check(self, sizes)
  return test


def group_sizes(num_rows, num_groups):
  """Group sizes with a sum of at most `num_rows`; empty groups are likely."""
  @st.composite
  def sizes(draw):
    cuts = sorted(draw(st.lists(st.integers(0, num_rows) | st.just(0), min_size=num_groups, max_size=num_groups)))
    return draw(st.permutations([b - a for a, b in zip([0] + cuts, cuts)]))
  return sizes()


def uneven(shape):
  """Two empty groups, and a tenth of the rows in none."""
  M = shape.N * shape.K
  return [M // 3, 0, M // 2, 0, M // 15]


def matmul_data(shape, dtype, seed=0):
  rng = np.random.RandomState(seed)
  M = shape.N * shape.K
  return (jnp.asarray(rng.randn(M, shape.D), dtype), jnp.asarray(rng.randn(shape.E, shape.D, shape.F), dtype),
          jnp.asarray(rng.randn(M, shape.F), dtype))


def poison(a, group_sizes):
  return jnp.where((jnp.arange(len(a)) < sum(group_sizes))[:, None], a, jnp.nan)


def block_data(shape, group_sizes, activation, dtype, biases):
  """x, weights, routes and a cotangent; the last token is chosen by no group, and is NaN."""
  rng = np.random.RandomState(1)
  n, k, e, d, f = shape.N, shape.K, shape.E, shape.D, shape.F
  draw = lambda *size: jnp.asarray(rng.randn(*size) / math.sqrt(size[-2] if len(size) == 3 else 1), dtype)
  gated = activation in ('geglu', 'reglu', 'swiglu')
  weights = Weights(wi=draw(e, d, f), wo=draw(e, f, d), wg=draw(e, d, f) if gated else None,
                    bi=draw(e, f) if biases else None, bg=draw(e, f) if biases and gated else None,
                    bo=draw(e, d) if biases else None)
  choice = rng.permutation(n * k)  # the choice that each row serves
  token, position = choice // k, np.argsort(choice).reshape(n, k)
  x, dy = draw(n, d), draw(n, d)
  unused = np.setdiff1d(np.arange(n), token[:sum(group_sizes)])
  x = x.at[unused].set(jnp.nan)
  weight = poison(jnp.asarray(rng.rand(n * k), jnp.float32)[:, None], group_sizes)[:, 0]
  return x, weights, Routes(jnp.array(token), weight, jnp.array(group_sizes, jnp.int32), jnp.array(position)), dy


def matmul_loop(x, w, group_sizes, dy):
  """y, dx and dw in float64, one row at a time."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
  for row, e in enumerate(np.repeat(np.arange(len(group_sizes)), group_sizes)):
    y[row] = x[row] @ w[e]
    dx[row] = w[e] @ dy[row]
    dw[e] += np.outer(x[row], dy[row])
  return y, dx, dw


def group_products(x, w, group_sizes, dy):
  """y, dx and dw in float64, one group at a time; rows after the last group are left out."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  ends = np.cumsum(group_sizes)
  groups = [slice(end - size, end) for end, size in zip(ends, group_sizes)]
  return (np.concatenate([x[rows] @ w[e] for e, rows in enumerate(groups)]),
          np.concatenate([dy[rows] @ w[e].T for e, rows in enumerate(groups)]),
          np.stack([x[rows].T @ dy[rows] for rows in groups]))


def block_loop(x, weights, routes, dy, activation):
  """y, dx, dweights and dweight in float64, one row at a time, by the chain rule."""
  x, dy, share = (np.asarray(a, np.float64) for a in (x, dy, routes.weight))
  w = Weights(*(None if a is None else np.asarray(a, np.float64) for a in weights))
  plain, gated = {'geglu': ('gelu', True), 'reglu': ('relu', True), 'swiglu': ('silu', True)}.get(activation,
                                                                                             (activation, False))
  y, dx, dshare = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(share)
  dw = Weights(*(None if a is None else np.zeros_like(a) for a in w))
  bias = lambda b, e: 0 if b is None else b[e]
  sizes = np.asarray(routes.group_sizes)
  for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
    t, g = int(routes.token[row]), share[row]
    zi = x[t] @ w.wi[e] + bias(w.bi, e)
    zg = x[t] @ w.wg[e] + bias(w.bg, e) if gated else None
    act, slope = scalar_activation(plain, zg if gated else zi)
    hidden = act * zi if gated else act
    out = hidden @ w.wo[e] + bias(w.bo, e)
    y[t] += g * out
    dshare[row] = out @ dy[t]
    dhidden = g * (w.wo[e] @ dy[t])
    dzi, dzg = (dhidden * act, dhidden * zi * slope) if gated else (dhidden * slope, None)
    dx[t] += w.wi[e] @ dzi
    changes = dict(wi=np.outer(x[t], dzi), wo=g * np.outer(hidden, dy[t]), bi=dzi, bo=g * dy[t])
    if gated:
      dx[t] += w.wg[e] @ dzg
      changes |= dict(wg=np.outer(x[t], dzg), bg=dzg)
    for name, change in changes.items():
      if getattr(dw, name) is not None:
        getattr(dw, name)[e] += change
  return y, dx, dw, dshare


def scalar_activation(name, z):
  """The activation and its derivative."""
  if name == 'relu':
    return np.maximum(z, 0), (z > 0) * 1.
  if name == 'squared_relu':
    return np.maximum(z, 0)**2, 2 * np.maximum(z, 0)
  if name == 'silu':
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))
  c = math.sqrt(2 / math.pi)  # gelu, tanh approximation
  t = np.tanh(c * (z + 0.044715 * z**3))
  return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2) / 2


def close(got, expected, dtype):
  """Equal but for rounding: a few roundings of intermediates to `dtype`, and float32 sums of at most some hundred terms."""
  eps = {'float32': 2**-24 * 300, 'bfloat16': 2**-8 * 4}[dtype]
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=eps, atol=eps * max(np.abs(expected).max(), 1e-30))
