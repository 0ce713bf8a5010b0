"""MultiHash layers against a loop over tokens in float64, and with one hash against plain hash layers.

The formula is that of Hash Layers (2106.04426), section 3.2: v = relu([A_1 x, .., A_N x]), y = [B_1 v, .., B_N v], with
segment n of both matrices that of expert h_n(id).
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.feed_forwards.moe import MoE
from moejax.routing import papers
from moejax.routing.inputs import RouterInputs
from moejax.routing.score.hashing import hash_table

B, S, D, F, E, V = 2, 9, 6, 12, 4, 11
IDS = jax.random.randint(jax.random.key(0), (B, S), 0, V)
X = jax.random.normal(jax.random.key(1), (B, S, D))
VALID = jnp.ones((B, S), bool).at[1, 6:].set(False)


def build(hashes=2, router=None, experts=None, dispatch='segments'):
  config = dict(num_experts=E, experts=experts or dict(name='segments', hidden=F, segments=hashes),
                router=router or papers.multi_hash(V, hashes), dispatch=dict(name=dispatch))
  return functional.functionalize(
      lambda rngs: call(MoE, config, 'config.moe', dim=D, dtype=jnp.float32, rngs=rngs), MoE.mix)


def run(layer, params):
  def loss(params):
    y, output = layer.apply(params, {}, X, RouterInputs(token_ids=IDS, valid=VALID))
    return jnp.square(y).sum(), (y, output.metrics)
  (_, (y, metrics)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return y, metrics, gradients


def random_params(layer):
  rng = np.random.RandomState(0)
  return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.4, leaf.shape)), layer.shapes()[0])


@pytest.mark.parametrize('hashes', [2, 3])
def test_equals_the_loop_over_tokens(hashes):
  layer = build(hashes)
  params = random_params(layer)
  y, metrics, _ = run(layer, params)
  wi, wo = (np.asarray(params['experts'][name], np.float64) for name in ('wi', 'wo'))
  tables = [hash_table('random', V, E, 42 + n) for n in range(hashes)]
  assert any((tables[0] != table).any() for table in tables[1:])
  expected = np.zeros((B, S, D))
  for b, s in np.ndindex(B, S):
    chosen = [table[IDS[b, s]] for table in tables]
    v = np.concatenate([np.maximum(np.asarray(X[b, s], np.float64) @ wi[n, e], 0) for n, e in enumerate(chosen)])
    if VALID[b, s]:
      expected[b, s] = np.concatenate([v @ wo[n, e] for n, e in enumerate(chosen)])
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)  # float32 sums of tens of terms of order one
  assert metrics['dropped'] == 0  # also of tokens whose hashes agree


def test_one_hash_is_a_plain_hash_layer():
  multi = build(1)
  plain = build(router=papers.hash_layers(V), experts=dict(name='feed_forward', hidden=F, activation='relu'),
                dispatch='grouped')
  params = random_params(plain)
  y, metrics, gradients = run(plain, params)
  of_multi = run(multi, jax.tree.map(lambda leaf: leaf[None], params))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # the same sums in another order
  close(of_multi[0], y)
  jax.tree.map(close, jax.tree.map(lambda leaf: leaf[0], of_multi[2]), gradients)
  np.testing.assert_allclose(of_multi[1]['load'], metrics['load'])


def test_experts_share_no_parameters_but_words_share_segments():
  """N hashes combine E experts to E^N feed-forwards with the same number of parameters."""
  sizes = {hashes: sum(leaf.size for leaf in jax.tree.leaves(build(hashes).shapes()[0])) for hashes in (1, 2, 3)}
  assert sizes[1] == sizes[2] == sizes[3] == E * 2 * D * F
  combined = set(zip(*(hash_table('random', 1000, E, 42 + n).tolist() for n in range(2))))
  assert len(combined) == E**2


@pytest.mark.parametrize('config, message', [
    (dict(dispatch='grouped'), "config.moe.dispatch: experts 'segments' need dispatch"),
    (dict(experts=dict(name='feed_forward', hidden=F)), r'config.moe.dispatch: each token has 2 choices'),
    (dict(hashes=4), 'experts.segments must be .* that divides dim and that divides hidden, not 4'),
    (dict(router=papers.switch()), "config.moe.dispatch: dispatcher 'segments' requires token choice"),
    (dict(router=papers.multi_hash(V, 2, 'modulo')), 'config.moe.router.score.hashes is 2'),
])
def test_parts_that_do_not_fit_are_refused_before_anything_is_compiled(config, message):
  with pytest.raises(ConfigError, match=message):
    layer = build(**config)
    jax.eval_shape(layer.apply, *layer.shapes(), X, RouterInputs(token_ids=IDS))
