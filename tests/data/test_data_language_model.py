"""The pipeline 'language_model': rows and targets against the text of their documents."""
import itertools
import json

import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError

TEXTS = [chr(97 + index) * (3 + 7 * index % 19) + f' {index}' for index in range(21)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  (folder / 'train.txt').write_text('\n'.join(TEXTS))
  (folder / 'test.txt').write_text('één\ntwo\n' + 'x' * 40)
  return folder


@pytest.fixture
def build(folder):
  def build(**changes):
    source = dict(name='text', document='line',
                  files=dict(train=str(folder / 'train.txt'), test=str(folder / 'test.txt')))
    return data.build({**dict(name='language_model', source=source, tokenizer=dict(name='bytes'), length=16,
                              batch_size=4, shuffle_batches=2), **changes})
  return build


def documents_in(batches):
  """The contents of rows, cut at segments: lists of (tokens, targets)."""
  pieces = []
  for batch in batches:
    for row in range(len(batch['tokens'])):
      for segment in range(1, batch['segments'][row].max(initial=0) + 1):
        chosen = batch['segments'][row] == segment
        pieces.append((batch['tokens'][row][chosen].tolist(), batch['targets'][row][chosen].tolist()))
  return pieces


def stream_of(texts):
  """The concatenated targets of documents: their bytes, then 257."""
  return [value for text in texts for value in (*text.encode(), 257)]


def test_batches_match_batch_spec(build):
  pipeline = build()
  for batch, size in ((next(pipeline.train(0)), None), *((batch, 6) for batch in pipeline.evaluate('test', 6))):
    spec = pipeline.batch_spec(size)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {n: (s.shape, s.dtype) for n, s in spec.items()}


def test_evaluation_predicts_every_byte_and_every_end_once_in_order(build):
  batches = list(build().evaluate('test'))
  targets = np.concatenate([batch['targets'].ravel()[batch['loss_mask'].ravel() > 0] for batch in batches])
  expected = stream_of(['één', 'two', 'x' * 40])
  assert targets.tolist() == expected
  # 5 + 3 + 40 bytes of text; the ends stand for no bytes, padding is masked and stands for none.
  num_bytes = np.concatenate([batch['target_bytes'].ravel() for batch in batches])
  assert num_bytes.sum() == 48 and num_bytes[:len(expected)].tolist() == [int(value != 257) for value in expected]
  assert not num_bytes[len(expected):].any()


def test_every_target_is_the_token_that_comes_next_in_its_document(build):
  previous = 257
  for tokens, targets in documents_in(build().evaluate('test')):
    assert tokens[1:] == targets[:-1]
    # A document starts from 256, or continues in the next row from the last target of the previous one.
    assert tokens[0] == (256 if previous == 257 else previous)
    previous = targets[-1]


def test_positions_restart_with_each_segment(build):
  for batch in itertools.islice(build().train(0), 6):
    for segments, positions in zip(batch['segments'], batch['positions']):
      assert (np.diff(segments) >= 0).all() and segments[0] == 1
      for segment in range(1, segments.max() + 1):
        held = positions[segments == segment]
        np.testing.assert_array_equal(held, np.arange(len(held)))


def test_training_sees_every_document_once_per_epoch_whatever_the_packing(build):
  # Without shuffling rows, the stream of targets is the documents in order: cut it at the ends.
  epoch = len(stream_of(TEXTS))
  batches = build(shuffle_batches=1, batch_size=1).train(0)
  stream = []
  while len(stream) < 3 * epoch:
    stream += next(batches)['targets'].ravel().tolist()
  seen = ''.join(chr(value) if value < 256 else '|' for value in stream[:3 * epoch]).split('|')[:-1]
  for start in range(0, 63, 21):
    # The rows of a window of one batch of one row are in order.
    assert sorted(seen[start:start + 21]) == sorted(TEXTS)
  assert seen[:21] != seen[21:42]


def test_shuffling_changes_the_order_of_rows_only(build):
  rows = lambda **changes: [tuple(row) for batch in itertools.islice(build(batch_size=2, **changes).train(1), 8)
                            for row in batch['targets']]
  plain, shuffled = rows(shuffle_batches=1), rows(shuffle_batches=8)
  assert plain != shuffled and sorted(plain) == sorted(shuffled)


@pytest.mark.parametrize('threads', [0, 2])
@pytest.mark.parametrize('steps', [0, 1, 2, 13])
def test_a_restored_state_continues_with_the_same_batches_and_any_threads(build, steps, threads):
  batches = build(threads=threads).train(5)
  for _ in range(steps):
    next(batches)
  text = json.dumps(batches.get_state())
  assert len(text) < 200
  expected = [next(batches) for _ in range(9)]
  resumed = build(threads=2 - threads).train(5)
  resumed.set_state(json.loads(text))
  for batch in expected:
    for name, value in next(resumed).items():
      np.testing.assert_array_equal(value, batch[name])


def test_readers_read_disjoint_documents_and_together_all(build):
  epochs = []
  for row in range(3):
    batches = build(batch_size=3, readers=3, shuffle_batches=1).train(0, np.array([row]))
    stream = []
    while stream.count(257) < 14:
      stream += next(batches)['targets'].ravel().tolist()
    epochs.append(''.join(chr(value) if value < 256 else '|' for value in stream).split('|')[:14])
  # 21 documents over 3 readers are 7 each per epoch.
  for start in (0, 7):
    assert sorted(sum((documents[start:start + 7] for documents in epochs), [])) == sorted(TEXTS)


@pytest.mark.parametrize('readers', [1, 2, 4])
@pytest.mark.parametrize('rows', [[0, 1], [2, 3], [1, 2, 3]])
def test_any_rows_of_a_batch_can_be_read_without_the_others(build, readers, rows):
  whole, some = (build(batch_size=4, readers=readers).train(5, wanted) for wanted in (None, np.array(rows)))
  for _ in range(9):
    batch, part = next(whole), next(some)
    for name in batch:
      np.testing.assert_array_equal(part[name], batch[name][rows])


def test_the_states_of_all_processes_resume_any_rows(build):
  def start(rows):
    return build(batch_size=4, readers=4).train(5, np.array(rows))
  halves, whole = [start([0, 1]), start([2, 3])], start(range(4))
  for _ in range(5):
    next(whole), *map(next, halves)
  states = [half.get_state() for half in halves]
  assert states[0] | states[1] == whole.get_state()
  for rows in ([0, 1, 2, 3], [3], [0, 2]):
    resumed, expected = start(rows), start(rows)
    resumed.set_state(json.loads(json.dumps(states[0] | states[1])))
    for _ in range(5):
      next(expected)
    for _ in range(5):
      np.testing.assert_array_equal(next(resumed)['tokens'], next(expected)['tokens'])


def test_shares_of_an_evaluation_make_up_the_whole_batch(build):
  whole = list(build().evaluate('train'))
  half = len(whole[0]['tokens']) // 2
  shares = [list(build().evaluate('train', rows=rows)) for rows in (np.arange(half), np.arange(half, 2 * half))]
  assert len(whole) == len(shares[0]) == len(shares[1])
  for batch, *parts in zip(whole, *shares):
    for name in batch:
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])


def test_documents_of_ids_start_from_their_own_id_and_do_not_end():
  pipeline = data.build(dict(
      name='language_model', length=32, batch_size=4, tokenizer=dict(name='ids', num_ids=16),
      source=dict(name='markov_mixture', document_length=32, train_documents=8, test_documents=8)))
  pipeline.check(dict(name='decoder', vocab_size=17))
  tokens = np.concatenate([batch['tokens'] for batch in pipeline.evaluate()])
  targets = np.concatenate([batch['targets'] for batch in pipeline.evaluate()])
  documents = pipeline.source.open('test')
  np.testing.assert_array_equal(targets, np.stack([documents[index]['tokens'] for index in range(8)]))
  np.testing.assert_array_equal(tokens, np.c_[np.full(8, 16), targets[:, :-1]])


def test_a_model_that_does_not_fit_is_refused(build):
  build().check(dict(name='decoder', vocab_size=258))
  with pytest.raises(ConfigError, match='config.model.vocab_size is 256, but config.data gives ids below 258'):
    build().check(dict(name='decoder', vocab_size=256))
  with pytest.raises(ConfigError, match="config.data gives tokens, but the model 'vision' has no vocab_size"):
    build().check(dict(name='vision', num_classes=10))


def test_configs_that_cannot_work_are_refused(build):
  for changes, message in ((dict(length=0), 'config.data.length must be an int of at least 1, not 0'),
                           (dict(shuffle_batches=0), 'shuffle_batches must be an int of at least 1, not 0'),
                           (dict(tokenizer=dict(name='byte')), "no tokenizer 'byte'. Did you mean 'bytes'")):
    with pytest.raises(ConfigError, match=message):
      build(**changes)
  with pytest.raises(ConfigError, match="no split 'dev'. Allowed: train, test"):
    build().evaluate('dev')


def test_models_at_paper_scale_are_checked_without_the_tokenizer_file():
  pipeline = data.build(dict(
      name='language_model', source=dict(name='jsonl', files=dict(train='/none/c4-*.jsonl.gz')), length=2048,
      batch_size=1024, tokenizer=dict(name='sentencepiece', path='/none/model', vocab_size=32000)))
  assert pipeline.batch_spec()['tokens'].shape == (1024, 2048)
  pipeline.check(dict(name='decoder', vocab_size=32000))


def test_a_pipeline_describes_its_data(build):
  description = build().describe()
  assert description['documents'] == {'train': 21, 'test': 3} and description['vocab_size'] == 258
