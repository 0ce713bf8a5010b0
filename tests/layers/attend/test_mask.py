"""Masks against their definition, one query and key at a time."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_masks import masks
from hypothesis import given, strategies as st

from moejax.layers.attend import EMPTY, Mask

B = 2


def sees(mask, b, s, t):
  """Whether query s of row b sees key t."""
  query, key = (s, t) if mask.query_positions is None else (mask.query_positions[b, s], mask.key_positions[b, t])
  same = mask.query_segments is None or mask.query_segments[b, s] == mask.key_segments[b, t]
  past = not mask.causal or key <= query or (mask.prefix is not None and mask.prefix[b, t])
  near = mask.window is None or query - mask.window < key < query + mask.window
  return bool(same and past and near and key != EMPTY)


@given(data=st.data(), queries=st.integers(1, 5), keys=st.integers(1, 5))
def test_a_dense_mask_equals_its_definition(data, queries, keys):
  mask = jax.tree.map(np.asarray, data.draw(masks(B, queries, keys)))
  expected = [[[[sees(mask, b, s, t) for t in range(keys)] for s in range(queries)]] for b in range(B)]
  got = mask.dense(queries, keys)
  if got is None:
    assert np.all(expected)
  else:
    assert got.shape in [(1, 1, queries, keys), (B, 1, queries, keys)]
    np.testing.assert_array_equal(np.broadcast_to(got, (B, 1, queries, keys)), expected)


def test_packed_segments_see_themselves_and_padding_sees_padding():
  segments = jnp.asarray([[1, 1, 2, 0]])
  bidirectional = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
  np.testing.assert_array_equal(Mask(segments, segments).dense(4, 4)[0, 0], np.asarray(bidirectional, bool))
  np.testing.assert_array_equal(Mask(segments, segments, causal=True).dense(4, 4)[0, 0],
                                np.tril(np.asarray(bidirectional, bool)))


def test_a_window_is_the_query_and_the_tokens_before_it():
  expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
  np.testing.assert_array_equal(Mask(causal=True).with_window(2).dense(4, 4)[0, 0], np.asarray(expected, bool))
  assert Mask(causal=True, window=2).with_window(None) == Mask(causal=True)


def test_a_prefix_sees_itself_in_both_directions():
  expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
  mask = Mask(causal=True, prefix=jnp.asarray([[True, True, False, False]]))
  np.testing.assert_array_equal(mask.dense(4, 4)[0, 0], np.asarray(expected, bool))


def test_a_query_at_the_end_of_a_ring_buffer_sees_the_past_and_no_empty_slot():
  # Eight slots, ten tokens: slots 0 and 1 hold tokens 8 and 9. In the second row, four tokens.
  keys = jnp.asarray([[8, 9, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, EMPTY, EMPTY, EMPTY, EMPTY]])
  mask = Mask(query_positions=jnp.asarray([[9], [3]]), key_positions=keys, causal=True, window=3)
  expected = [[1, 1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0, 0, 0]]
  np.testing.assert_array_equal(mask.dense(1, 8)[:, 0, 0], np.asarray(expected, bool))


def test_a_mask_is_data_whose_direction_and_window_are_static():
  leaves, tree = jax.tree.flatten(Mask(*[jnp.zeros((1, 2), int)] * 2, causal=True, window=3))
  assert len(leaves) == 2
  assert jax.tree.unflatten(tree, leaves).window == 3
  assert jax.eval_shape(lambda mask: mask.dense(2, 2), jax.tree.unflatten(tree, leaves)).shape == (1, 1, 2, 2)


@pytest.mark.parametrize('fields, message', [
    (dict(query_segments=jnp.zeros((1, 2))), 'query_segments and key_segments, or neither'),
    (dict(prefix=jnp.zeros((1, 2), bool)), 'without it every key is'),
    (dict(window=0), 'window = 0: it counts the query itself'),
])
def test_masks_that_mean_nothing_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Mask(**fields)
