"""Long documents are tokenized in pieces of bounded size, with the same batches as if whole."""
import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import data
from moejax.data import TOKENIZERS, tokenizers


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
  monkeypatch.setattr(tokenizers, '_LONGEST_PIECE', 16)


def pipeline(folder, name, **changes):
  files = {split: str(folder / 'a.txt') for split in ('train', 'test')}
  return data.build({**dict(name=name, source=dict(name='text', files=files, document='line'),
                            tokenizer=dict(name='bytes'), length=24, batch_size=2, shuffle_batches=2), **changes})


def text(count, seed=0):
  rng = np.random.default_rng(seed)
  return '\n'.join(''.join(rng.choice(list('abc é日  '), size=rng.integers(1, 120))) + 'x' for _ in range(count))


def batches(built, count):
  return [*itertools.islice(built.train(3), count), *built.evaluate('test')]


@pytest.mark.parametrize('name', ['language_model', 'span_corruption'])
def test_pieces_give_the_same_batches_as_whole_documents(tmp_path, monkeypatch, name):
  (tmp_path / 'a.txt').write_text(text(12))
  cut = batches(pipeline(tmp_path, name), 20)
  monkeypatch.setattr(tokenizers, '_LONGEST_PIECE', 1 << 20)
  whole = batches(pipeline(tmp_path, name), 20)
  assert len(cut) == len(whole) > 20
  for one, other in zip(cut, whole):
    for field in other:
      np.testing.assert_array_equal(one[field], other[field])


@pytest.mark.parametrize('name', ['language_model', 'span_corruption'])
@pytest.mark.parametrize('steps', [0, 1, 5, 12])
def test_a_restored_state_continues_inside_a_document(tmp_path, name, steps):
  (tmp_path / 'a.txt').write_text(text(2).replace('\n', '') * 3 + '\nshort')
  running = pipeline(tmp_path, name).train(1)
  for _ in range(steps):
    next(running)
  resumed = pipeline(tmp_path, name).train(1)
  resumed.set_state(json.loads(json.dumps(running.get_state())))
  for _ in range(6):
    expected, batch = next(running), next(resumed)
    for field in expected:
      np.testing.assert_array_equal(batch[field], expected[field])


@given(st.text(st.sampled_from('ab \n日'), max_size=100))
def test_pieces_are_the_text_and_begin_with_white_space_where_there_is_some(text):
  built = TOKENIZERS.build(dict(name='bytes'), 'x')
  pieces = [bytes(ids.tolist()).decode() for ids, _ in built.pieces({'text': text})]
  assert ''.join(pieces) == text and all(len(piece) <= 16 for piece in pieces)
  for before, piece in itertools.pairwise(pieces):
    assert piece[0].isspace() or not any(map(str.isspace, before[1:]))


def test_words_keep_their_ids_in_pieces():
  built = TOKENIZERS.build(dict(name='hashed_words', vocab_size=1000), 'x')
  document = {'text': 'some words, and more of them than fit a piece'}
  ids, num_bytes = built.encode(document)
  pieces = list(built.pieces(document))
  assert len(pieces) > 2
  np.testing.assert_array_equal(np.concatenate([part for part, _ in pieces]), ids)
  assert sum(part.sum() for _, part in pieces) == num_bytes.sum()


def test_memory_does_not_grow_with_a_document_beyond_its_text(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizers, '_LONGEST_PIECE', 1 << 12)
  size = 4_000_000
  (tmp_path / 'a.txt').write_text('word ' * (size // 5))
  built = pipeline(tmp_path, 'language_model')
  tracemalloc.start()
  try:
    next(built.train(0))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  # The line, its text and one more copy; ids and bytes alone would be 8 times the size.
  assert peak < 5 * size
