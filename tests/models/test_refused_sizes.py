"""Invalid sizes, rates and depths are refused when a model is built, in a sentence with their path."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moejax import functional, models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.layers.stack import Stack

# A sequence in which no pattern comes three times in a row.
THUE_MORSE = [n for n in range(300) if n.bit_count() % 2]
LSTM = dict(name='lstm', vocab_size=13, dim=8)
SPEECH = dict(name='speech', num_features=5, vocab_size=7, dim=8) | tiny.body()
TWO = dict(name='two_modalities', image_size=8, patch_size=4, vocab_size=13, text_length=6, dim=8,
           embedding_dim=4) | tiny.body()
SIZES = [(tiny.decoder(), ('vocab_size', 'dim', 'num_layers')), (LSTM, ('vocab_size', 'dim')),
         (tiny.vision(), ('image_size', 'patch_size', 'channels', 'num_classes', 'dim', 'num_layers')),
         (SPEECH, ('num_features', 'vocab_size', 'dim')), (TWO, ('text_length', 'embedding_dim', 'num_layers')),
         (tiny.encoder_decoder(), ('vocab_size', 'dim'))]


@pytest.mark.parametrize('value', [0, -1, 2**31, [8]])
@pytest.mark.parametrize('config, key', [(config, key) for config, keys in SIZES for key in keys],
                         ids=[f'{config["name"]}-{key}' for config, keys in SIZES for key in keys])
def test_a_size_is_a_count_of_32_bits(config, key, value):
  with pytest.raises(ConfigError, match=f'^config.model.{key} must be an int'):
    models.build(config | {key: value})


@pytest.mark.parametrize('change, sentence', [
    (dict(attention=dict(heads=0)), 'config.model.attention.heads must be an int of at least 1'),
    (dict(attention=dict(heads=2, head_dim=0)), 'attention.head_dim must be'),
    (dict(attention=dict(heads=2, kv_heads=0)), 'attention.kv_heads must be'),
    (dict(attention=dict(heads=2, dropout=1.)), 'attention.dropout must be a float of at least 0 and below 1'),
    (dict(attention=dict(heads=2, init=dict(name='fan_in', scale=-1.))), 'init.scale must be a float above 0'),
    (dict(dropout=-0.1), 'config.model.dropout must be'), (dict(stochastic_depth=1), 'config.model.stochastic_depth'),
    (dict(norm=dict(name='rms_norm', epsilon=-1e-6)), 'config.model.norm.epsilon must be'),
    (dict(embedding_init=dict(name='normal', std=-1)), 'config.model.embedding_init.std must be'),
    (dict(sparse=dict(name='every', n=0)), 'config.model.sparse.n must be'),
    (dict(sparse=dict(name='layers', indices=[-1])), 'config.model.sparse.indices must be'),
    (dict(positions=dict(name='rope', theta=0.5)), 'config.model.positions.theta must be a float of at least 1'),
    (dict(positions=dict(name='relative_bias', buckets=2)), 'positions.buckets must be'),
    (dict(positions=dict(name='relative_bias', buckets=8, max_distance=4)), 'max_distance must be above 4, not 4'),
    (dict(positions=dict(name='sincos2d')), 'config.model.positions: sincos2d is for image patches'),
])
def test_unsupported_keys_of_a_decoder_are_refused(change, sentence):
  with pytest.raises(ConfigError, match=sentence):
    models.build(tiny.decoder() | change)


@pytest.mark.parametrize('change, sentence', [
    (dict(attention=dict(heads=2, head_dim=3)), 'config.model.positions: .* head_dim must be even, not 3'),
    (dict(dim=6), 'must be even, not 3'),
    (dict(positions=dict(name='learned', length=4)), 'config.model.positions.length = 4 is less than the sequence length 5'),
])
def test_what_does_not_fit_the_tokens_is_refused_while_tracing(change, sentence):
  model = models.build(tiny.decoder() | change)
  with pytest.raises(ConfigError, match=sentence):
    jax.eval_shape(lambda: model.apply(*model.init(jax.random.key(0)), dict(tokens=jnp.zeros((2, 5), int))))


@pytest.mark.parametrize('change, sentence', [
    (dict(num_layers=1001), 'config.model.num_layers must be an int from 1 to 1000, not 1001'),
    (dict(num_layers=101), "num_layers = 101 makes 101 blocks .* more than the maximum of 100. Use stacking='scan'"),
    (dict(num_layers=1000, stacking='unrolled'), 'makes 1000 blocks'),
    (dict(num_layers=300, stacking='scan', sparse=dict(name='layers', indices=THUE_MORSE)), 'makes ... blocks'),
])
def test_more_blocks_than_can_be_traced_one_by_one_are_refused(change, sentence):
  with pytest.raises(ConfigError, match=sentence):
    models.build(tiny.decoder(tiny.DROPLESS) | change)


def test_a_thousand_scanned_layers_are_one_block_to_trace():
  model = models.build(tiny.decoder(num_layers=1000, stacking='scan'))
  assert flatten(model.shapes()[0])['blocks/0/0/attention/query'].shape == (1000, 8, 2, 4)


@pytest.mark.parametrize('kinds, scanned', [('aaaa', 1), ('abab', 2), ('aabab', 3), ('abcab', 5), ('a', 1)])
def test_traced_blocks_are_the_units_if_scanned_and_all_if_unrolled(kinds, scanned):
  assert Stack(tuple(kinds), 'scan').traced == scanned
  assert Stack(tuple(kinds), 'unrolled').traced == len(kinds)


@pytest.mark.parametrize('make', [lambda: jax.random.key(3), lambda: jax.random.split(jax.random.key(0))[1]])
def test_keys_equal_a_flax_stream(make):
  ours, flax = functional.Keys(make()), nnx.Rngs(params=make())
  for _ in range(4):
    np.testing.assert_array_equal(jax.random.key_data(ours.params()), jax.random.key_data(flax.params()))
