"""Hashes of pairs of words: even, and as defined."""
import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing.features import bigrams
from moejax.routing.inputs import RouterInputs
from moejax.routing.stages import FEATURES

V = 13
IDS = jax.random.randint(jax.random.key(1), (2, 8), 0, V)
INPUTS = RouterInputs(token_ids=IDS, previous_ids=jnp.roll(IDS, 1, 1))


def test_bigrams_hash_both_words_evenly():
  pairs = jnp.arange(V)[:, None] * jnp.ones(V, jnp.int32), jnp.ones((V, 1), jnp.int32) * jnp.arange(V)
  first, second = (jnp.tile(pair.reshape(1, -1), (40, 1)) + 1000 * jnp.arange(40)[:, None] for pair in pairs)
  buckets = np.asarray(bigrams.pair_hash(first, second, 16))
  # 6760 pairs: mean 422.5 a bucket, deviation 20; five of them.
  assert abs(np.bincount(buckets.ravel(), minlength=16) - 422.5).max() < 100
  assert buckets.min() >= 0
  of_pair = np.asarray(bigrams.pair_hash(*pairs, 2**20))
  assert len(np.unique(of_pair)) == V * V and (of_pair != of_pair.T).sum() == V * V - V  # order counts
  np.testing.assert_array_equal(FEATURES.build(dict(name='bigrams', buckets=7), 'f', dim=6)(jnp.zeros((2, 8, 6)), INPUTS),
                                bigrams.pair_hash(INPUTS.previous_ids, IDS, 7))


def test_pairs_hash_to_the_numbers_of_the_definition():
  """MurmurHash3's finaliser of 32 bits, in Python's ints."""
  def mix(h):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
      h = ((h ^ (h >> shift)) * factor) % 2**32
    return h
  for first, second in ((0, 0), (3, 7), (50_000, 12), (2**31 - 1, 2**31 - 1)):
    expected = mix((mix((first + 0x9E3779B9) % 2**32) + second) % 2**32) % 1000
    assert int(bigrams.pair_hash(jnp.int32(first), jnp.int32(second), 1000)) == expected
