"""Mixtures: the task of every token against its text, which reveals its source."""
import itertools
import json

import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data import mixture

# Each source has its own letters, and one has more documents than the others.
TEXTS = {'beta': ['b' * n for n in range(3, 30)], 'alpha': ['a' * n for n in (5, 40, 9)],
         'gamma': ['g' * n for n in (11, 7, 13, 2)]}
LETTERS = np.array([ord('a'), ord('b'), ord('g')])  # of the tasks, in alphabetical order


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for name, texts in TEXTS.items():
    (folder / name).write_text('\n'.join(texts))
  return folder


@pytest.fixture
def build(folder):
  def build(name='language_model', sources=tuple(TEXTS), **changes):
    files = {source: dict(name='text', document='line', files=dict(train=str(folder / source), test=str(folder / source)))
             for source in sources}
    return data.build({**dict(name=name, source=dict(name='mixture', sources=files), tokenizer=dict(name='bytes'),
                              length=16, batch_size=6, shuffle_batches=2), **changes})
  return build


@pytest.mark.parametrize('balance', ['examples', 'tasks'])
def test_every_token_names_the_source_of_its_document(build, balance):
  pipeline = build(balance=balance)
  for batch in (*itertools.islice(pipeline.train(0), 8), *pipeline.evaluate('test')):
    spec = pipeline.batch_spec()
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {n: (s.shape, s.dtype) for n, s in spec.items()}
    letters = (batch['loss_mask'] > 0) & (batch['targets'] < 256)
    assert letters.any()
    np.testing.assert_array_equal(LETTERS[batch['tasks']][letters], batch['targets'][letters])


def test_the_encoder_and_the_decoder_name_the_source_too(build):
  pipeline = build('span_corruption', length=32, balance='tasks', sentinels=10)
  for batch in itertools.islice(pipeline.train(0), 4):
    for side, tokens in (('encoder', 'encoder_tokens'), ('decoder', 'decoder_targets')):
      letters = (batch[f'{side}_segments'] > 0) & (batch[tokens] < 256)
      np.testing.assert_array_equal(LETTERS[batch[f'{side}_tasks']][letters], batch[tokens][letters])


def test_balanced_batches_have_equally_many_rows_of_each_source(build):
  for batch in itertools.islice(build(balance='tasks').train(0), 20):
    assert (batch['tasks'] == batch['tasks'][:, :1]).all()
    assert np.bincount(batch['tasks'][:, 0]).tolist() == [2, 2, 2]


def test_a_balanced_source_gives_each_document_once_per_epoch(build):
  streams = dict.fromkeys(range(3), '')
  batches = build(balance='tasks', batch_size=3, shuffle_batches=1).train(0)
  for batch in itertools.islice(batches, 60):
    for task, targets in zip(batch['tasks'][:, 0], batch['targets']):
      streams[task] += ''.join(chr(value) if value < 256 else '|' for value in targets)
  for task, name in enumerate(sorted(TEXTS)):
    documents, count = streams[task].split('|'), len(TEXTS[name])
    for epoch in range(2):
      assert sorted(documents[epoch * count:(epoch + 1) * count]) == sorted(TEXTS[name])


@pytest.mark.parametrize('steps', [0, 1, 7])
@pytest.mark.parametrize('balance', ['examples', 'tasks'])
def test_a_restored_state_continues_with_the_same_batches(build, balance, steps):
  batches = build(balance=balance, readers=2).train(5)
  for _ in range(steps):
    next(batches)
  resumed = build(balance=balance, readers=2).train(5)
  resumed.set_state(json.loads(json.dumps(batches.get_state())))
  for _ in range(5):
    expected, batch = next(batches), next(resumed)
    for name in expected:
      np.testing.assert_array_equal(batch[name], expected[name])


def test_any_rows_of_a_balanced_batch_can_be_read_without_the_others(build):
  rows = np.array([1, 4])
  whole, some = (build(balance='tasks').train(3, wanted) for wanted in (None, rows))
  for _ in range(5):
    batch, part = next(whole), next(some)
    for name in batch:
      np.testing.assert_array_equal(part[name], batch[name][rows])


def test_sources_that_cannot_be_mixed_or_balanced_are_refused(build, folder):
  with pytest.raises(ConfigError, match='config.data.source.sources must be a dict that is not empty'):
    build(sources=())
  with pytest.raises(ConfigError, match='batch_size must be a multiple of 3, the number of tasks'):
    build(balance='tasks', batch_size=4)
  with pytest.raises(ConfigError, match="the source 'text' has no tasks. Use the source 'mixture'"):
    build(balance='tasks', source=dict(name='text', files=str(folder / 'beta')))
  with pytest.raises(ConfigError, match=r'sources.beta.file: .* Did you mean .files.'):
    build(source=dict(name='mixture', sources=dict(beta=dict(name='text', file='x'))))


def test_the_default_domains_exist_and_differ():
  source = mixture.SourceMixture()
  assert source.tasks == ('code', 'dialogue', 'prose')
  examples = {split: source.open(split) for split in source.splits}
  joined = {}
  for task, name in enumerate(source.tasks):
    train, test = ([part[index]['text'] for index in range(len(part))]
                   for part in (examples[split].parts[task] for split in ('train', 'test')))
    assert train and test and examples['train'].parts[task][0]['task'] == task
    joined[name] = '\n'.join(test)
  assert min(map(len, joined.values())) > 20_000
  lines = {name: text.splitlines() for name, text in joined.items()}
  indented = {name: np.mean([line.startswith('    ') for line in here]) for name, here in lines.items()}
  questions = {name: text.count('?') / len(text) for name, text in joined.items()}
  assert indented['code'] > 2 * indented['prose'] and indented['dialogue'] == 0
  assert questions['dialogue'] > 5 * max(questions['code'], questions['prose'])
