"""Hash layers: fixed routes, and a feed-forward for each part of the vocabulary."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers, router
from moejax.routing.inputs import RouterInputs
from moejax.routing.score import hashing
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


def test_a_given_table_is_used_as_it_is():
  table = tuple(int(i * i % E) for i in range(V))
  plan = built(papers.hash_layers(V, table))(X, INPUTS).plan
  np.testing.assert_array_equal(plan.expert[..., 0], np.array(table)[IDS])


def test_hashed_selection_needs_as_many_hashes():
  fragment = papers.multi_hash(V, 2)
  with pytest.raises(ConfigError, match=r"config.router.select.k = 3 needs score=dict\(name='hash', hashes=3"):
    built(fragment | dict(select=dict(name='hashed', k=3)))(X, INPUTS)
