"""An encoder-decoder encodes once: the first call has the source, later ones only tokens of the target.

Oracle: one pass over the whole source and target, without a cache.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten, unflatten
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import rules

ROWS, SOURCE, LENGTH = 2, 5, 7
SOURCES = jax.random.randint(jax.random.key(0), (ROWS, SOURCE), 1, 13)
TARGETS = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 1, 13)
MIXED = dict(sparse_form='layer', moe=dict(num_experts=2, router=tiny.DROPLESS), sparse=dict(name='every', n=2))
CONFIGS = {
    'dense': tiny.encoder_decoder(),
    'scanned': tiny.encoder_decoder() | dict(decoder=tiny.body(num_layers=3, stacking='scan', attention=dict(heads=2, kv_heads=1))),
    'sparse on both sides, a window, rotary positions': tiny.encoder_decoder(
        tiny.DROPLESS, tiny.DROPLESS, positions=dict(name='rope')) | dict(
            decoder=tiny.body(tiny.DROPLESS, attention=dict(heads=2, window=3, use_bias=True))),
    'layers as experts': tiny.encoder_decoder() | dict(decoder=tiny.body(num_layers=2, **MIXED)),
    'layers as experts, scanned': tiny.encoder_decoder() | dict(decoder=tiny.body(num_layers=4, stacking='scan', **MIXED)),
}
# float32: the same sums over keys, in another order and of other lengths.
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@functools.cache
def compiled(name):
  """(model, params, (batch, cache, params) -> output with the cache donated, (sources, targets) -> logits of one pass)"""
  model, params, state, whole = tiny.initialised(CONFIGS[name])
  step = jax.jit(lambda batch, cache, params: model.apply(params, state, batch, cache=cache), donate_argnums=1)
  one_pass = lambda sources, targets: whole(params, state, dict(encoder_tokens=sources, decoder_tokens=targets)).logits
  return model, params, step, functools.cache(lambda: one_pass(SOURCES, TARGETS)), one_pass


def prefill(name, params=None, room=SOURCE):
  """The first call: the source, and three tokens."""
  model, sound, step, *_ = compiled(name)
  batch = dict(encoder_tokens=SOURCES, decoder_tokens=TARGETS[:, :3])
  return step(batch, model.init_cache(ROWS, LENGTH, room), sound if params is None else params)


@pytest.mark.parametrize('name', CONFIGS)
def test_chunks_and_single_tokens_equal_the_whole(name):
  _, params, step, expected, _ = compiled(name)
  output = prefill(name)
  logits = [output.logits]
  for start, end in ((3, 5), (5, 6), (6, 7)):
    output = step(dict(decoder_tokens=TARGETS[:, start:end]), output.cache, params)
    logits.append(output.logits)
  close(jnp.concatenate(logits, axis=1), expected())
  np.testing.assert_array_equal(output.cache['length'], [LENGTH] * ROWS)


@pytest.mark.parametrize('name', CONFIGS)
def test_later_calls_run_neither_the_encoder_nor_the_projections_of_the_source(name):
  _, params, step, *_ = compiled(name)
  unused = lambda path: 'encoder' in path or 'cross_attention/key' in path or 'cross_attention/value' in path
  spoilt = unflatten({path: leaf * jnp.nan if unused(path) and not path.startswith('decoder_encoding') else leaf
                      for path, leaf in flatten(params).items()})
  assert np.isnan(prefill(name, spoilt).logits).any()
  following = dict(decoder_tokens=TARGETS[:, 3:4])
  sound, other = (step(following, prefill(name).cache, trees) for trees in (params, spoilt))
  assert not any(name.startswith('encoder') for name in sound.routers)
  np.testing.assert_array_equal(sound.logits, other.logits)


@pytest.mark.parametrize('name', ['dense', 'scanned'])
def test_rows_go_on_from_their_own_lengths_and_see_their_own_sources(name):
  """Sources of 5 and 3 tokens in a cache for 8, targets of 4 and 2: each row as if it were alone, without padding."""
  model, params, step, whole, one_pass = compiled(name)
  sources, lengths = np.array([5, 3]), np.array([4, 2])
  segments = lambda size, lengths: jnp.asarray(np.arange(size) < lengths[:, None], jnp.int32)
  output = step(dict(encoder_tokens=SOURCES, encoder_segments=segments(SOURCE, sources), decoder_tokens=TARGETS[:, :4],
                     decoder_segments=segments(4, lengths)), model.init_cache(ROWS, LENGTH, 8), params)
  alone = [whole()[0], one_pass(SOURCES[1:, :3], TARGETS[1:])[0]]
  for row, length in enumerate(lengths):
    close(output.logits[row, :length], alone[row][:length])
  for ahead in range(3):
    following = jnp.take_along_axis(TARGETS, jnp.asarray(lengths + ahead)[:, None], axis=1)
    output = step(dict(decoder_tokens=following), output.cache, params)
    for row, length in enumerate(lengths):
      close(output.logits[row, 0], alone[row][length + ahead])


@pytest.mark.parametrize('name', CONFIGS)
def test_every_array_of_a_cache_has_its_axes_and_keeps_its_shape_and_type(name):
  model = compiled(name)[0]
  empty = model.init_cache(ROWS, LENGTH, SOURCE)
  shapes = lambda tree: {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(tree).items()}
  after = prefill(name).cache
  assert shapes(after) == shapes(empty)
  axes = flatten(model.cache_axes())
  assert {path: len(names) for path, names in axes.items()} == {path: leaf.ndim for path, leaf in flatten(empty).items()}
  # A step reads what cross-attention remembers and writes nothing to it.
  crossed = [path for path in axes if 'cross_attention' in path]
  step = compiled(name)[2](dict(decoder_tokens=TARGETS[:, 3:4]), prefill(name).cache, compiled(name)[1]).cache
  assert crossed
  for path in crossed:
    np.testing.assert_array_equal(flatten(step)[path], flatten(after)[path])


@pytest.mark.parametrize('name', ['dense', 'scanned', 'layers as experts, scanned'])
def test_on_a_mesh_a_cache_is_sharded_by_its_axes_donated_and_decodes_the_same(name):
  model, params, *_ = compiled(name)
  mesh, table = mesh_lib.build(dict(data=2, expert=2, model=2)), rules.build()
  rows = jnp.concatenate([TARGETS, TARGETS]), jnp.concatenate([SOURCES, SOURCES])
  shapes = jax.eval_shape(lambda: model.init_cache(2 * ROWS, LENGTH, SOURCE))
  placed = rules.shardings(mesh, model.cache_axes(), shapes, table.activations)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(batch, cache, params):
    output = model.apply(params, {}, batch, cache=cache)
    return output.logits, jax.lax.with_sharding_constraint(output.cache, placed)

  with rules.use(mesh, table):
    params = jax.device_put(params, rules.shardings(mesh, model.axes, params, table.parameters))
    cache = jax.jit(lambda: model.init_cache(2 * ROWS, LENGTH, SOURCE), out_shardings=placed)()
    logits, before = step(dict(encoder_tokens=rows[1], decoder_tokens=rows[0][:, :6]), cache, params)
    following, after = step(dict(decoder_tokens=rows[0][:, 6:]), before, params)
  whole = compiled(name)[3]()
  close(jnp.concatenate([logits, following], axis=1), jnp.concatenate([whole, whole]))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  for path, leaf in flatten(after).items():
    assert leaf.sharding.is_equivalent_to(flatten(placed)[path], leaf.ndim), path
  spread = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in flatten(after).items() if path.endswith('keys')}
  assert all(np.prod(shard) < np.prod(flatten(shapes)[path].shape) for path, shard in spread.items())


def test_a_source_that_is_too_long_says_so():
  with pytest.raises(ValueError, match=r'the source has 5 tokens, and the cache has room for 4: .*source_length=5'):
    prefill('dense', room=4)


def test_without_a_cache_every_batch_needs_its_source():
  model, params, *_ = compiled('dense')
  with pytest.raises(ConfigError, match="the model needs 'encoder_tokens'"):
    model.apply(params, {}, dict(decoder_tokens=TARGETS))


def test_a_decoder_has_nothing_to_cross_attend_to():
  blocks = dict(a=dict(cross=dict(name='cross_attention', heads=2), ffn=dict(name='feed_forward', hidden=8)))
  model = models.build(dict(name='decoder', vocab_size=13, dim=8, num_layers=1, blocks=blocks))
  for cache in (None, model.init_cache(ROWS, LENGTH)):
    with pytest.raises(ConfigError, match='config.model.blocks.a.cross: cross-attention needs the output of an encoder'):
      jax.eval_shape(model.apply, *model.shapes(), dict(tokens=TARGETS), cache=cache)
