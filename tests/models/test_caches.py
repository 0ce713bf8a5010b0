"""Tokens in chunks, or one at a time, give what one pass over the whole sequence gives."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules
from moejax.routing import papers

VOCABULARY, LENGTH, ROWS = 30, 9, 2
TOKENS = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 1, VOCABULARY)
DENSE = dict(attention=dict(heads=2, kv_heads=1), feed_forward=dict(hidden=12), num_layers=2)


def decoder(**config):
  return models.build(dict(name='decoder', vocab_size=VOCABULARY, dim=8, **{**DENSE, **config}))


def mixture(router, **config):
  return dict(num_experts=4, experts=dict(name='feed_forward', hidden=8), router=router,
              dispatch=dict(name='reference')) | config


def sparse(router, **config):
  return decoder(moe=mixture(router, **config), sparse=dict(name='every', n=1), routing_leak='oracle')


def sparse_layers(**config):
  return decoder(moe=dict(num_experts=3, router=papers.top_k_dropless(k=2)), sparse=dict(name='every', n=2),
                 sparse_form='layer', **config)


MODELS = {
    'grouped queries, rope': decoder(),
    'scanned': decoder(stacking='scan'),
    'a ring for each window, and all of what has none': decoder(
        attention=None, feed_forward=None, stacking='scan', num_layers=4, blocks={
            kind: dict(mixer=dict(name='attention', heads=2, sinks=True, **keys), ffn=dict(name='feed_forward', hidden=12))
            for kind, keys in dict(local=dict(window=3), full={}).items()},
        pattern=dict(name='cycle', kinds=('local', 'full'))),
    'relative bias': decoder(positions=dict(name='relative_bias', max_distance=20)),
    'learned positions': decoder(positions=dict(name='learned', length=LENGTH)),
    'shared blocks': decoder(sharing='all_but_norms'),
    'top-2 without capacity': sparse(papers.top_k_dropless(k=2)),
    'hashes of a token and the one before': sparse(papers.hash_layers(vocab_size=VOCABULARY, of='bigrams')),
    'layers as experts': sparse_layers(),
    'layers as experts, scanned': sparse_layers(stacking='scan', num_layers=4),
    'LSTM, mixture, LSTM': models.build(dict(
        name='lstm', vocab_size=VOCABULARY, dim=8, moe=mixture(papers.top_k_dropless(k=2)))),
    'LSTMs, scanned': decoder(attention=None, feed_forward=None, stacking='scan', blocks=dict(
        a=dict(mixer=dict(name='lstm'), ffn=dict(name='feed_forward', hidden=12)))),
}


@functools.cache
def compiled(name):
  """(params, state, (tokens, segments, cache) -> output)"""
  model = MODELS[name]
  params, state = jax.jit(model.init)(jax.random.key(1))
  apply = jax.jit(lambda batch, cache: model.apply(params, state, batch, cache=cache), donate_argnums=1)
  return model, apply, jax.jit(model.apply)(params, state, dict(tokens=TOKENS)).logits


def in_chunks(name, chunks):
  model, apply, _ = compiled(name)
  cache, logits, start = model.init_cache(ROWS, LENGTH), [], 0
  for size in chunks:
    output = apply(dict(tokens=TOKENS[:, start:start + size]), cache)
    cache, start = output.cache, start + size
    logits.append(output.logits)
  return jnp.concatenate(logits, axis=1), cache


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('chunks', [(4, 1, 1, 1, 1, 1), (5, 4)])
def test_chunks_equal_the_whole(name, chunks):
  logits, cache = in_chunks(name, chunks)
  # float32: the same sums over keys, in another order and of other lengths.
  np.testing.assert_allclose(logits, compiled(name)[2], atol=1e-5)
  np.testing.assert_array_equal(cache['length'], [LENGTH] * ROWS)


def test_rows_of_different_lengths_go_on_from_their_own():
  """Prompts of 5 and 3 tokens, padded at the end, then tokens one by one: each row as if it were alone."""
  model, apply, expected = compiled('grouped queries, rope')
  lengths = np.array([5, 3])
  segments = jnp.asarray(np.arange(5) < lengths[:, None], jnp.int32)
  output = apply(dict(tokens=TOKENS[:, :5], segments=segments), model.init_cache(ROWS, LENGTH))
  np.testing.assert_array_equal(output.cache['length'], lengths)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(output.logits[row, :length], expected[row, :length], atol=1e-5)
  for step in range(4):
    following = jnp.take_along_axis(TOKENS, jnp.asarray(lengths + step)[:, None], axis=1)
    output = apply(dict(tokens=following), output.cache)
    for row, length in enumerate(lengths):
      np.testing.assert_allclose(output.logits[row, 0], expected[row, length + step], atol=1e-5)


def test_a_window_remembers_no_more_than_it_sees():
  cache = MODELS['a ring for each window, and all of what has none'].init_cache(ROWS, LENGTH)
  local, full = cache['blocks']['0']['0']['mixer'], cache['blocks']['0']['1']['mixer']
  assert local['keys'].shape == (2, ROWS, 3, 2, 4) and full['keys'].shape == (2, ROWS, LENGTH, 2, 4)


def test_a_cache_is_placed_by_the_names_of_its_axes():
  model = MODELS['scanned']
  shapes = jax.eval_shape(lambda: model.init_cache(8, LENGTH))
  mesh = mesh_lib.build(dict(data=4, model=2))
  placed = rules.shardings(mesh, model.cache_axes(), shapes, rules.build().activations)
  spec = placed['blocks']['0']['0']['attention']['keys'].spec  # [L,B,T,N,k], N=1 head stays whole
  assert spec[:3] == (None, 'data', None)


def test_routers_with_a_capacity_compete_with_the_tokens_of_the_call():
  """A whole sequence fills the slots of an expert; a token alone finds them free. So decoding differs where tokens are
  dropped, and only there."""
  router = papers.switch(capacity_factor=1., eval_capacity_factor=0.5)
  name = 'capacity'
  MODELS[name] = sparse(router)
  logits, _ = in_chunks(name, (1,) * LENGTH)
  model, _, whole = compiled(name)
  params, state = jax.jit(model.init)(jax.random.key(1))
  dropped = model.apply(params, state, dict(tokens=TOKENS)).routers['block_00'].metrics['dropped']
  assert dropped > 0.3 and np.abs(logits - whole).max() > 1e-3


def test_layers_as_experts_remember_all_tokens_each():
  """A layer computes the tokens of other layers too, so that its attention sees them; so it remembers them."""
  model = MODELS['layers as experts, scanned']
  keys = model.init_cache(ROWS, LENGTH)['blocks']['0']['1']['moe']['attention']['keys']
  assert keys.shape == (2, 3, ROWS, LENGTH, 1, 4)
  axes = model.cache_axes()['blocks']['0']['1']['moe']['attention']['keys']
  assert axes == ('layers', 'expert', 'batch', 'length', 'kv_heads', 'head_dim')
