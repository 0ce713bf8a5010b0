"""Packing: every document stays whole and in order, and resuming is exact anywhere."""
import functools
import json

import grain
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.packing import ConcatWindow, Document, FirstFitWindow, Packing

LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=30)


def documents_of(lengths):
  """Documents of distinct values, so that each token reveals its origin: 100 * document + place, from 100."""
  return [100 * index + np.arange(length) for index, length in enumerate(lengths, 1)]


def in_parts(sizes, parts):
  """A document whose parts have these sizes."""
  return Document(lambda: iter(zip(sizes, parts)))


def concat(lengths, length, batch_size, batches, seed=None, part=24):
  elements = [in_parts([len(one) for one in parts], [{'tokens': one} for one in parts])
              for document in documents_of(lengths)
              for parts in [np.split(document, range(part, len(document), part))]]
  window = functools.partial(ConcatWindow, length=length, names=('tokens',))
  source = grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(0, 0))
  return Packing(source, window, batch_size, batches, seed)


def first_fit(lengths, batch_size, batches, seed=None):
  """Each document is a piece on one side and its first half on the other."""
  elements = [in_parts([1], [[{'whole': {'tokens': document}, 'half': {'some': document[:(len(document) + 1) // 2]}}]])
              for document in documents_of(lengths)]
  window = functools.partial(FirstFitWindow, lengths={'whole': 23, 'half': 15})
  source = grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(0, 0))
  return Packing(source, window, batch_size, batches, seed)


def rows_of(packing):
  batches = list(packing)
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]} if batches else None


@given(lengths=LENGTHS, length=st.integers(1, 17), batch_size=st.integers(1, 4), batches=st.integers(1, 3))
def test_concatenated_rows_hold_all_documents_in_order_with_padding_only_at_the_end(lengths, length, batch_size,
                                                                                    batches):
  rows = rows_of(concat(lengths, length, batch_size, batches))
  stream = np.concatenate(documents_of(lengths))
  if rows is None:
    assert not stream.size
    return
  tokens, segments = rows['tokens'].ravel(), rows['segments'].ravel()
  np.testing.assert_array_equal(tokens[:len(stream)], stream)
  assert (segments[:len(stream)] > 0).all()
  for name in rows:
    assert not rows[name].ravel()[len(stream):].any()


@given(lengths=LENGTHS, length=st.integers(1, 17), part=st.integers(1, 24), batches=st.integers(1, 3))
def test_rows_do_not_depend_on_the_parts_of_documents(lengths, length, part, batches):
  whole, cut = (rows_of(concat(lengths, length, 2, batches, part=size)) for size in (24, part))
  assert (whole is None) == (cut is None)
  for name in whole or ():
    np.testing.assert_array_equal(whole[name], cut[name])


@given(lengths=LENGTHS, length=st.integers(1, 17), batch_size=st.integers(1, 4), batches=st.integers(1, 3))
def test_segments_number_the_documents_of_a_row_and_positions_count_within_them(lengths, length, batch_size, batches):
  rows = rows_of(concat(lengths, length, batch_size, batches))
  for tokens, segments, positions in zip(*(rows[name] for name in ('tokens', 'segments', 'positions'))) if rows else ():
    seen = []
    for token, segment, position in zip(tokens, segments, positions):
      if not segment:
        continue
      document = token // 100
      if not seen or seen[-1][0] != document:
        seen.append((document, 0))
      assert (segment, position) == (len(seen), seen[-1][1])
      seen[-1] = (document, position + 1)


@given(lengths=st.lists(st.integers(1, 23), min_size=1, max_size=30), batch_size=st.integers(1, 4),
       batches=st.integers(1, 3))
def test_first_fit_keeps_pieces_whole_and_both_sides_in_one_row_and_segment(lengths, batch_size, batches):
  rows = rows_of(first_fit(lengths, batch_size, batches))
  found = []
  for row in range(len(rows['tokens'])):
    for segment in range(1, rows['whole_segments'][row].max() + 1):
      whole, half = rows['whole_segments'][row] == segment, rows['half_segments'][row] == segment
      tokens, some = rows['tokens'][row][whole], rows['some'][row][half]
      np.testing.assert_array_equal(rows['whole_positions'][row][whole], np.arange(len(tokens)))
      np.testing.assert_array_equal(rows['half_positions'][row][half], np.arange(len(some)))
      np.testing.assert_array_equal(some, tokens[:len(some)])
      found.append(tokens.tolist())
  assert sorted(found) == sorted(document.tolist() for document in documents_of(lengths))


def test_first_fit_puts_a_piece_into_the_first_row_with_room_on_every_side():
  # Sides hold 23 and 15. 20 leaves (3, 5); 10 does not fit there and opens row 2, leaving (13, 10); 3 fits row 1; 12
  # fits row 2.
  rows = rows_of(first_fit([20, 10, 3, 12], batch_size=2, batches=1))
  assert [sorted(set(row[row > 0] // 100)) for row in rows['tokens']] == [[1, 3], [2, 4]]


@given(lengths=LENGTHS, batch_size=st.integers(1, 3), batches=st.integers(1, 3), seed=st.integers(0, 5),
       stop=st.integers(0, 12), first_fits=st.booleans(), part=st.integers(1, 24))
def test_a_restored_state_continues_with_the_same_batches(lengths, batch_size, batches, seed, stop, first_fits, part):
  pack = first_fit if first_fits else functools.partial(concat, length=7, part=part)
  packing = pack([length + 1 for length in lengths][:29], batch_size=batch_size, batches=batches, seed=(seed,)) \
      if not first_fits else pack([min(length + 1, 23) for length in lengths], batch_size, batches, (seed,))
  whole = list(packing)
  iterator = iter(packing)
  for _ in range(min(stop, len(whole))):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  resumed = iter(packing)
  next(resumed, None)  # the state replaces the current one
  resumed.set_state(state)
  rest = list(resumed)
  assert len(rest) == len(whole) - min(stop, len(whole))
  for batch, expected in zip(rest, whole[len(whole) - len(rest):]):
    for name in expected:
      np.testing.assert_array_equal(batch[name], expected[name])


@given(lengths=LENGTHS, seed=st.integers(0, 5))
def test_shuffling_exchanges_rows_within_windows_only(lengths, seed):
  plain, shuffled = rows_of(concat(lengths, 5, 2, 2)), rows_of(concat(lengths, 5, 2, 2, (seed,)))
  if plain is None:
    return
  used = lambda rows: rows['tokens'][rows['segments'].any(-1)]
  plain, shuffled = used(plain), used(shuffled)
  assert len(plain) == len(shuffled)
  for start in range(0, len(plain), 4):
    assert sorted(map(tuple, plain[start:start + 4])) == sorted(map(tuple, shuffled[start:start + 4]))
