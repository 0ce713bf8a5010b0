"""The encoder-decoder: dependencies of each side, packing, and the routers each side accepts."""
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from moejax import models
from moejax.config import ConfigError
from moejax.functional import flatten
from moejax.routing import papers

BATCH = dict(encoder_tokens=jnp.asarray([[1, 5, 2, 9], [3, 3, 8, 1]]),
             decoder_tokens=jnp.asarray([[0, 4, 7, 2, 6, 1], [0, 2, 2, 11, 5, 3]]))


@pytest.fixture(scope='module')
def sparse():
  _, params, state, apply = tiny.initialised(tiny.encoder_decoder(tiny.DROPLESS, tiny.DROPLESS))
  return lambda **batch: apply(params, state, batch)


def test_targets_depend_on_all_sources_and_no_later_targets(sparse):
  before = sparse(**BATCH).logits
  for position in range(4):
    after = sparse(**BATCH | dict(encoder_tokens=BATCH['encoder_tokens'].at[0, position].set(12))).logits
    assert (np.abs(before[0] - after[0]).max(-1) > 0).all()
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)
  for position in range(6):
    after = sparse(**BATCH | dict(decoder_tokens=BATCH['decoder_tokens'].at[0, position].set(12))).logits
    np.testing.assert_allclose(before[0, :position], after[0, :position], atol=1e-6)
    assert (np.abs(before[0, position:] - after[0, position:]).max(-1) > 0).all()


def test_packed_pairs_get_the_logits_they_get_alone(sparse):
  places = dict(encoder_segments=[1, 1, 2, 2], encoder_positions=[0, 1, 0, 1],
                decoder_segments=[1, 1, 1, 2, 2, 2], decoder_positions=[0, 1, 2, 0, 1, 2])
  packed = sparse(**BATCH, **{name: jnp.asarray([row] * 2) for name, row in places.items()}).logits
  alone = sparse(encoder_tokens=BATCH['encoder_tokens'].reshape(4, 2),
                 decoder_tokens=BATCH['decoder_tokens'].reshape(4, 3)).logits
  np.testing.assert_allclose(packed, alone.reshape(packed.shape), atol=1e-5)  # sums in another order


def test_routers_report_by_side_and_depth(sparse):
  assert set(sparse(**BATCH).routers) == {'encoder_block_01', 'decoder_block_01'}


def test_routers_that_look_ahead_are_welcome_in_the_encoder_only():
  models.build(tiny.encoder_decoder(papers.expert_choice(), tiny.SWITCH))
  with pytest.raises(ConfigError, match='config.model.decoder.moe.router cannot be used in a decoder'):
    models.build(tiny.encoder_decoder(None, papers.expert_choice()))


def test_each_side_has_one_table_of_position_biases():
  paths = [path for path in flatten(models.build(tiny.encoder_decoder()).axes) if 'encoding' in path]
  assert sorted(paths) == ['decoder_encoding/table', 'encoder_encoding/table']


def test_st_moe_follows_each_mixture_with_a_dense_branch():
  side = tiny.body(tiny.SWITCH, num_layers=4, sparse=dict(name='every', n=4), extra_feed_forward=tiny.FEED_FORWARD)
  axes = flatten(models.build(tiny.encoder_decoder(encoder=None) | dict(encoder=side)).axes)
  blocks = {path.split('/')[2] for path in axes if path.startswith('encoder/') and 'extra_feed_forward' in path}
  assert blocks == {'3'}
