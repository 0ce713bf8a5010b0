"""Tables of hashed experts: counted by hand, and refused where they do not fit."""
import collections
import functools

from flax import nnx
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.routing.score import hashing
from moejax.routing.stages import SCORES


def test_a_random_hash_table_is_uniform_fixed_and_its_seed_s_own():
  table = hashing.hash_table('random', 4096, 8, 42)
  counts = np.bincount(table, minlength=8)
  # Binomial(4096, 1/8): mean 512, deviation 21; five of them.
  assert abs(counts - 512).max() < 106
  np.testing.assert_array_equal(table, hashing.hash_table('random', 4096, 8, 42))
  assert (table != hashing.hash_table('random', 4096, 8, 43)).any()


def test_a_balanced_table_gives_equal_counts_without_frequencies():
  assert set(collections.Counter(hashing.hash_table('balanced', 22, 4, 0).tolist()).values()) == {5, 6}


def test_a_balanced_table_splits_the_mass_as_evenly_as_its_heaviest_word_allows():
  # Greedy: 8 alone is more than its share; 4+1 and 3+2 follow (8 -> a, 4 -> b, 3 -> c, 2 -> c (3 < 4), 1 -> b (4 < 5)).
  frequencies = (1., 8., 2., 4., 3.)
  table = hashing.hash_table('balanced', 5, 3, 0, frequencies)
  mass = np.bincount(table, weights=frequencies, minlength=3)
  assert sorted(mass) == [5, 5, 8]


def test_a_modulo_table_is_the_id_modulo_e():
  np.testing.assert_array_equal(hashing.hash_table('modulo', 7, 3), [0, 1, 2, 0, 1, 2, 0])


@functools.cache
def embeddings():
  """Four far corners of a square, seven words near each."""
  corners = np.array([[0, 0], [0, 9], [9, 0], [9, 9.]])
  return np.repeat(corners, 7, axis=0) + np.random.RandomState(0).uniform(-1, 1, (28, 2))


def test_a_clustered_table_gives_like_words_the_same_expert_and_a_dispersed_one_different_ones():
  clustered = np.reshape(hashing.clustered_table(embeddings(), 4), (4, 7))
  assert (clustered == clustered[:, :1]).all() and len(set(clustered[:, 0])) == 4
  dispersed = np.reshape(hashing.dispersed_table(embeddings(), 4), (4, 7))
  for corner in dispersed:  # 7 words over 4 experts
    assert sorted(np.bincount(corner, minlength=4)) == [1, 2, 2, 2]
  np.testing.assert_array_equal(np.bincount(dispersed.ravel()), 7)


@pytest.mark.parametrize('config, message', [
    (dict(vocab_size=3, table=(0, 1)), r'config\.score\.table must have an expert below 4 for each of the 3 ids'),
    (dict(vocab_size=2, table=(0, 4)), r'config\.score\.table must have an expert below 4'),
    (dict(vocab_size=2, table=(0, 1), hashes=2), r'with hashes=1; got 2 entries'),
    (dict(vocab_size=2, hashes=0), r'config\.score\.hashes must be an int of at least 1, not 0'),
    (dict(vocab_size=2, table='modulo', hashes=2), r'all hashes are equal'),
])
def test_tables_that_do_not_fit_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    SCORES.build(dict(name='hash') | config, 'config.score', dim=None, num_experts=4, rngs=nnx.Rngs(0))
