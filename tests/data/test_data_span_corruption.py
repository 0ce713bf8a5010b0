"""Span corruption: encoder and decoder restore the text, and counts follow T5's formula."""
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import data
from moejax.config import ConfigError
from moejax.data import DataError
from moejax.data.span_corruption import corrupted_lengths, noise_counts, noise_mask

START, END = 256, 257


def build(folder=None, **changes):
  source = dict(name='text', document='line', files=dict(train=str(folder / '*.txt'), test=str(folder / '*.txt'))
                if folder else '/none')
  return data.build({**dict(name='span_corruption', source=source, tokenizer=dict(name='bytes'), length=32,
                            batch_size=4, shuffle_batches=2), **changes})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  (folder / 'a.txt').write_text('\n'.join(f'{index}:' + 'abcdefghij' * (index % 11) for index in range(20)))
  return folder


def texts_of(folder):
  return (folder / 'a.txt').read_text().split('\n')


def reconstruct(encoder, decoder, vocab_size):
  """Replaces each sentinel by the decoder's text after it. Written from the definition alone."""
  spans, current = {}, None
  for token in decoder[:-1]:
    if token > END:
      current = spans.setdefault(token, [])
    else:
      current.append(token)
  assert decoder[-1] == encoder[-1] == END
  # Sentinels count down from the last id, in the same order on both sides.
  assert list(spans) == [vocab_size - 1 - index for index in range(len(spans))]
  assert [token for token in encoder if token > END] == list(spans)
  return [token for item in encoder[:-1] for token in (spans[item] if item > END else [item])]


def pieces(batches):
  for batch in batches:
    for row in range(len(batch['encoder_tokens'])):
      for segment in range(1, batch['encoder_segments'][row].max(initial=0) + 1):
        read, wrote = (batch[f'{side}_segments'][row] == segment for side in ('encoder', 'decoder'))
        yield {name: value[row][read if name.startswith('encoder') else wrote] for name, value in batch.items()}


@given(text=st.lists(st.integers(0, 255), min_size=2, max_size=150), density=st.floats(.05, .9),
       mean_span=st.floats(1, 6), seed=st.integers(0, 99))
def test_the_text_comes_back_from_encoder_and_decoder(text, density, mean_span, seed):
  pipeline = build(noise_density=density, mean_span=mean_span, sentinels=300, length=64)
  recovered = []
  (_, chunks), = pipeline.prepare([(np.array(text), np.ones(len(text), np.int32))], (seed,))
  for piece in chunks:
    encoder, targets = piece['encoder']['encoder_tokens'], piece['decoder']['decoder_targets']
    recovered += reconstruct(encoder.tolist(), targets.tolist(), 258 + 300)
    assert piece['decoder']['decoder_tokens'].tolist() == [START, *targets[:-1]]
    np.testing.assert_array_equal(piece['decoder']['target_bytes'], targets < 256)
    # The packing relies on this: every chunk, even a short one, fits an empty row.
    assert len(encoder) <= 64 and len(targets) <= pipeline.target_length
  dropped = len(text) - len(recovered)
  assert recovered == text[:len(text) - dropped] and dropped == (len(text) % pipeline.chunk_length == 1)


@given(length=st.integers(2, 600), density=st.floats(.01, .99), mean_span=st.floats(1, 10), seed=st.integers(0, 99))
def test_noise_follows_t5s_formula(length, density, mean_span, seed):
  mask = noise_mask(length, density, mean_span, np.random.default_rng(seed))
  noise = min(max(round(length * density), 1), length - 1)
  spans = min(max(round(noise / mean_span), 1), length - noise, noise)
  begins = np.count_nonzero(np.diff(mask.astype(int), prepend=0) == 1)
  assert (len(mask), mask.sum(), begins) == (length, noise, spans)
  assert not mask[0] and mask[-1]


def test_lengths_match_t5():
  # 568 * 0.15 = 85.2 -> 85 noise tokens in round(85 / 3) = 28 spans. The encoder reads 568 - 85 + 28 + 1 = 512, the
  # decoder writes 85 + 28 + 1 = 114, as in the T5 code's documentation of its pretraining lengths.
  assert noise_counts(568, .15, 3.) == (85, 28)
  assert corrupted_lengths(512, .15, 3.) == (568, 114)
  # By hand for 8: 9 tokens have 1 noise token (1.35) in 1 span, 9 - 1 + 1 + 1 = 10 > 8; 7 have 1, 7 - 1 + 1 + 1 = 8.
  assert corrupted_lengths(8, .15, 3.) == (7, 3)


def test_all_ways_to_cut_spans_are_equally_likely():
  # 6 tokens, half noise in 2 spans: 3 = 1 + 2 = 2 + 1 on both sides, so 4 masks. Chi-squared with 3 degrees of freedom
  # has its 1 - 1e-6 quantile at 30.7.
  assert noise_counts(6, .5, 1.5) == (3, 2)
  rng = np.random.default_rng(0)
  masks = [tuple(noise_mask(6, .5, 1.5, rng)) for _ in range(2000)]
  counts = np.array([masks.count(mask) for mask in set(masks)])
  assert len(counts) == 4 and ((counts - 500) ** 2 / 500).sum() < 30.7


def test_batches_match_batch_spec(folder):
  pipeline = build(folder)
  for batch in (next(pipeline.train(0)), *pipeline.evaluate('test')):
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (s.shape, s.dtype) for n, s in pipeline.batch_spec().items()}


def test_evaluation_holds_every_document_once_and_pads_the_rest(folder):
  batches = list(build(folder).evaluate('test', batch_size=3))
  chunks = sorted(bytes(reconstruct(p['encoder_tokens'].tolist(), p['decoder_targets'].tolist(), 358)).decode()
                  for p in pieces(batches))
  size = build(folder).chunk_length
  # A last chunk of one byte is dropped.
  assert chunks == sorted(text[start:start + size] for text in texts_of(folder)
                          for start in range(0, len(text) - 1, size))
  for batch in batches:
    np.testing.assert_array_equal(batch['loss_mask'], batch['decoder_segments'] > 0)
    for name, value in batch.items():
      side = 'encoder' if name.startswith('encoder') else 'decoder'
      assert not value[batch[f'{side}_segments'] == 0].any()


def test_positions_restart_with_each_piece(folder):
  for piece in pieces(itertools.islice(build(folder).train(0), 4)):
    for side in ('encoder', 'decoder'):
      positions = piece[f'{side}_positions']
      np.testing.assert_array_equal(positions, np.arange(len(positions)))


def test_evaluation_has_the_same_noise_every_time_and_training_new_noise_every_epoch(folder):
  first, second = (list(build(folder).evaluate('test')) for _ in range(2))
  for one, other in zip(first, second):
    np.testing.assert_array_equal(one['encoder_tokens'], other['encoder_tokens'])
  corrupted = {}
  for piece in pieces(itertools.islice(build(folder).train(0), 60)):
    text = tuple(reconstruct(piece['encoder_tokens'].tolist(), piece['decoder_targets'].tolist(), 358))
    corrupted.setdefault(text, set()).add(tuple(piece['encoder_tokens']))
  longest = max(corrupted, key=len)
  assert len(corrupted[longest]) > 3


@pytest.mark.parametrize('steps', [0, 1, 2, 13])
def test_a_restored_state_continues_with_the_same_batches(folder, steps):
  batches = build(folder).train(5)
  for _ in range(steps):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(9)]
  resumed = build(folder).train(5)
  resumed.set_state(state)
  for batch in expected:
    for name, value in next(resumed).items():
      np.testing.assert_array_equal(value, batch[name])


def test_configs_that_cannot_work_are_refused():
  for changes, message in ((dict(noise_density=1.), 'noise_density must be a float above 0 and below 1, not 1.0'),
                           (dict(mean_span=.5), 'mean_span must be a float of at least 1, not 0.5'),
                           (dict(length=2), 'config.data.length must be at least 3, not 2'),
                           (dict(sentinels=1), 'sentinels: a chunk of 34 tokens has 2 spans, .* to at least 2')):
    with pytest.raises(ConfigError, match=message):
      build(**changes)
  with pytest.raises(ConfigError, match='span corruption requires an end token'):
    list(build(tokenizer=dict(name='ids', num_ids=9)).prepare([(np.arange(5), np.ones(5))], (0,)))


def test_documents_too_short_to_corrupt_are_refused_without_waiting(tmp_path):
  (tmp_path / 'a.txt').write_text('x\ny\n')
  with pytest.raises(DataError, match='10000 consecutive documents were empty or too short to pack'):
    next(build(tmp_path).train(0))
  assert list(build(tmp_path).evaluate('test')) == []


def test_a_model_needs_ids_for_the_sentinels():
  build().check(dict(name='encoder_decoder', vocab_size=358))
  with pytest.raises(ConfigError, match='vocab_size is 258, but config.data gives ids below 358'):
    build().check(dict(name='encoder_decoder', vocab_size=258))
