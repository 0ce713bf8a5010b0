"""Position encodings: identities that define them, and a bucket function written from its definition."""
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st

from moejax.config import ConfigError
from moejax.layers.attend import Mask, attend
from moejax.layers.positions import POSITIONS, position_encoding, relative_position_bucket

RNG = np.random.default_rng(0)
X = jnp.float32(RNG.normal(size=(2, 5, 3, 8)))


def bucket_by_definition(distance, bidirectional, buckets, max_distance):
  """Exact rational arithmetic, one distance at a time: logarithmic bucket b holds d with (d/e)^r >= (m/e)^(b-e)."""
  if bidirectional:
    buckets //= 2
    side, d = (buckets if distance > 0 else 0), abs(distance)
  else:
    side, d = 0, max(-distance, 0)
  exact = buckets // 2
  if d < exact:
    return side + d
  rest = buckets - exact
  b = exact
  while b + 1 < buckets and Fraction(d, exact) ** rest >= Fraction(max_distance, exact) ** (b + 1 - exact):
    b += 1
  return side + b


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('buckets, max_distance', [(32, 128), (16, 40), (8, 20)])
def test_relative_buckets_equal_their_definition(bidirectional, buckets, max_distance):
  distance = np.arange(-300, 301)
  expected = [bucket_by_definition(int(d), bidirectional, buckets, max_distance) for d in distance]
  np.testing.assert_array_equal(relative_position_bucket(distance, bidirectional, buckets, max_distance), expected)


def test_relative_bias_depends_on_distance_only():
  encoding = POSITIONS.build(dict(name='relative_bias', buckets=8, max_distance=20), 'positions', heads=3, dim=4,
                             bidirectional=True, rngs=nnx.Rngs(0))
  bias = encoding.bias(6, 6)
  assert bias.shape == (1, 3, 6, 6)
  np.testing.assert_array_equal(bias[..., 1:, 1:], bias[..., :-1, :-1])


def test_sincos2d_tells_rows_from_columns_and_leaves_the_class_token():
  encoding = POSITIONS.build(dict(name='sincos2d'), 'positions', dim=8, grid=(2, 3), prefix=1)
  table = encoding.embed(jnp.zeros((1, 7, 8)), jnp.arange(7)[None])[0]
  np.testing.assert_array_equal(table[0], 0)
  # Behind the class token, the patch in row 1 and column 1 of a 2 x 3 grid has index 1 + 1 * 3 + 1.
  omega = np.asarray([1., 1e-4])
  expected = np.concatenate([np.sin(omega), np.cos(omega), np.sin(omega), np.cos(omega)])
  np.testing.assert_allclose(table[5], expected, rtol=1e-6)
  assert len(np.unique(np.asarray(table), axis=0)) == 7
  with pytest.raises(ConfigError, match='multiple of 4'):
    POSITIONS.build(dict(name='sincos2d'), 'positions', dim=10, grid=(2, 3), prefix=0)


def test_learned_positions_refuse_longer_sequences_before_compilation():
  encoding = POSITIONS.build(dict(name='learned', length=4), 'positions', dim=8, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(encoding.embed(jnp.zeros((1, 2, 8)), jnp.asarray([[3, 0]]))[0],
                                encoding.table[...][jnp.asarray([3, 0])])
  with pytest.raises(ConfigError, match='positions.length = 4 is less than the sequence length 5'):
    jax.eval_shape(encoding.embed, jnp.zeros((1, 5, 8)), jnp.zeros((1, 5), int))


def test_nothing_attends_to_nan():
  out = attend(X, X, X, scale=1., mask=Mask(jnp.ones((2, 5)), jnp.zeros((2, 5))))
  np.testing.assert_allclose(out, jnp.broadcast_to(X.mean(1, keepdims=True), X.shape), atol=1e-6)


def test_nothing_as_large_as_an_image_or_a_square_of_tokens_is_computed_while_tracing():
  encoding = position_encoding(dict(name='sincos2d'), 'positions', dim=8, grid=(2**14, 2**14), prefix=1)
  tokens = jax.ShapeDtypeStruct((1, 2**28 + 1, 8), jnp.float32)
  assert jax.eval_shape(encoding.embed, tokens, jax.ShapeDtypeStruct(tokens.shape[:2], jnp.int32)) == tokens
  encoding = position_encoding(dict(name='relative_bias'), 'positions', heads=3, dim=4, bidirectional=True,
                               rngs=nnx.Rngs(0))
  assert jax.eval_shape(lambda: encoding.bias(2**16, 2**16)).shape == (1, 3, 2**16, 2**16)


@given(queries=st.integers(1, 9), keys=st.integers(1, 9), bidirectional=st.booleans())
def test_the_relative_bias_of_a_pair_comes_from_its_bucket(queries, keys, bidirectional):
  encoding = position_encoding(dict(name='relative_bias', buckets=8, max_distance=20), 'positions', heads=2, dim=4,
                               bidirectional=bidirectional, rngs=nnx.Rngs(0))
  bias, table = np.asarray(encoding.bias(queries, keys))[0], np.asarray(encoding.table[...])
  for query in range(queries):
    for key in range(keys):
      bucket = relative_position_bucket(np.asarray(key - query), bidirectional, 8, 20)
      np.testing.assert_array_equal(bias[:, query, key], table[bucket])
