"""Hash layers: fixed routes, and tables counted by hand."""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers, router, stages
from moejax.routing.features import bigrams
from moejax.routing.inputs import RouterInputs
from moejax.routing.score import hashing
from moejax.routing.stages import SCORES
import routing_reference as reference

G, S, D, F, E, V = 2, 8, 6, 10, 4, 13
X = jax.random.normal(jax.random.key(0), (G, S, D))
IDS = jax.random.randint(jax.random.key(1), (G, S), 0, V)
INPUTS = RouterInputs(token_ids=IDS, previous_ids=jnp.roll(IDS, 1, 1), next_ids=jnp.roll(IDS, -1, 1),
                      positions=jnp.broadcast_to(jnp.arange(S), IDS.shape))


def built(fragment):
  return router.build(fragment, 'config.router', dim=D, num_experts=E, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('of, values', [('token_ids', IDS), ('previous_ids', INPUTS.previous_ids),
                                        ('next_ids', INPUTS.next_ids), ('positions', INPUTS.positions)])
def test_the_expert_is_the_table_entry_of_the_hashed_feature_with_weight_one(of, values):
  module = built(papers.hash_layers(V, of=of))
  plan = reference.run(module, X, INPUTS, train=True).plan
  np.testing.assert_array_equal(plan.expert[..., 0], hashing.hash_table('random', V, E, 42)[values])
  assert (plan.weight == 1).all() and plan.kept.all()
  assert module.leak(True) == module.leak(False) == ('future' if of == 'next_ids' else 'causal')


def test_routes_depend_on_neither_parameters_nor_steps_nor_keys():
  fragments = [papers.hash_layers(V), papers.hash_layers(V, of='bigrams'), papers.multi_hash(V)]
  for fragment in fragments:
    model = functional.functionalize(lambda rngs: router.build(fragment, 'r', dim=D, num_experts=E, rngs=rngs))
    assert model.shapes() == ({}, {})  # nothing to learn, and nothing that counts steps
    plans = [model.apply({}, {}, factor * X, INPUTS, key=jax.random.key(seed), train=train).plan
             for factor, seed, train in ((1, 0, True), (-3, 1, True), (1, 2, False))]
    for plan in plans[1:]:
      np.testing.assert_array_equal(plan.expert, plans[0].expert)


def test_a_hash_layer_is_a_feed_forward_for_each_part_of_the_vocabulary():
  """Each token passes the dense feed-forward of its part, computed here for the parts one after the other."""
  config = dict(num_experts=E, experts=dict(name='feed_forward', hidden=F, activation='relu'),
                router=papers.hash_layers(V), dispatch=dict(name='grouped'))
  layer = functional.functionalize(lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)
  rng = np.random.RandomState(0)
  params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.4, leaf.shape)), layer.shapes()[0])
  y, _ = layer.apply(params, {}, X, INPUTS)
  table, x = hashing.hash_table('random', V, E, 42), np.asarray(X, np.float64)
  for part in range(E):
    inside = table[np.asarray(IDS)] == part
    wi, wo = (np.asarray(params['experts'][name][part], np.float64) for name in ('wi', 'wo'))
    np.testing.assert_allclose(y[inside], np.maximum(x[inside] @ wi, 0) @ wo, rtol=0, atol=1e-5)


def test_bigrams_hash_both_words_evenly():
  pairs = jnp.arange(V)[:, None] * jnp.ones(V, jnp.int32), jnp.ones((V, 1), jnp.int32) * jnp.arange(V)
  first, second = (jnp.tile(pair.reshape(1, -1), (40, 1)) + 1000 * jnp.arange(40)[:, None] for pair in pairs)
  buckets = np.asarray(bigrams.pair_hash(first, second, 16))
  # 6760 pairs: mean 422.5 a bucket, deviation 20; five of them.
  assert abs(np.bincount(buckets.ravel(), minlength=16) - 422.5).max() < 100
  assert buckets.min() >= 0
  of_pair = np.asarray(bigrams.pair_hash(*pairs, 2**20))
  assert len(np.unique(of_pair)) == V * V and (of_pair != of_pair.T).sum() == V * V - V  # order counts
  np.testing.assert_array_equal(stages.FEATURES.build(dict(name='bigrams', buckets=7), 'f', dim=D)(X, INPUTS),
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


def test_a_given_table_is_used_as_it_is():
  table = tuple(int(i * i % E) for i in range(V))
  plan = built(papers.hash_layers(V, table))(X, INPUTS).plan
  np.testing.assert_array_equal(plan.expert[..., 0], np.array(table)[IDS])


@pytest.mark.parametrize('config, message', [
    (dict(vocab_size=3, table=(0, 1)), r'config\.score\.table must have an expert below 4 for each of the 3 ids'),
    (dict(vocab_size=2, table=(0, 4)), r'config\.score\.table must have an expert below 4'),
    (dict(vocab_size=2, table=(0, 1), hashes=2), r'with hashes=1; got 2 entries'),
    (dict(vocab_size=2, hashes=0), r'config\.score\.hashes must be an int of at least 1, not 0'),
    (dict(vocab_size=2, table='modulo', hashes=2), r'all hashes are equal'),
])
def test_tables_that_do_not_fit_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    SCORES.build(dict(name='hash') | config, 'config.score', dim=None, num_experts=E, rngs=nnx.Rngs(0))


def test_hashed_selection_needs_as_many_hashes():
  fragment = papers.multi_hash(V, 2)
  with pytest.raises(ConfigError, match=r"config.router.select.k = 3 needs score=dict\(name='hash', hashes=3"):
    built(fragment | dict(select=dict(name='hashed', k=3)))(X, INPUTS)
