"""Values out of range are refused, each by its key, before a file is opened."""
import inspect
import re

import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data import PIPELINES, SOURCES, TOKENIZERS
from moejax.data.augment import AUGMENTATIONS

SOURCE = {
    'digits': {}, 'digits_with_captions': {}, 'rotated_digits': {}, 'chitchat': {}, 'python_library': {},
    'clusters': {}, 'python_prose': {}, 'emoji': {}, 'spoken_digits': {}, 'speakers': {},
    'markov_mixture': {}, 'mixture': {},
    'fashion_mnist': {}, 'text': dict(files='/none'), 'jsonl': dict(files='/none'), 'array_record': dict(path='/none'),
    'idx': dict(path='/none', num_classes=2),
    'tfds': dict(dataset='x', fields=dict(text='x'), partitions=dict(train='x')),
    'huggingface': dict(dataset='x', fields=dict(text='x'), partitions=dict(train='x'))}
TOKENIZER = {'bytes': {}, 'ids': dict(num_ids=3), 'hashed_words': dict(vocab_size=9),
             'sentencepiece': dict(path='/none', vocab_size=9),
             'huggingface': dict(path='/none', vocab_size=9, end_token='x')}
PIPELINE = {
    'images': dict(source=dict(name='digits'), image_size=8, channels=1, batch_size=8),
    'image_text': dict(source=dict(name='digits_with_captions'), image_size=8, channels=1, batch_size=8, length=4,
                       tokenizer=dict(name='hashed_words', vocab_size=9)),
    'language_model': dict(source=dict(name='chitchat'), tokenizer=dict(name='bytes'), length=8, batch_size=8),
    'span_corruption': dict(source=dict(name='chitchat'), tokenizer=dict(name='bytes'), length=8, batch_size=8),
    'speech': dict(source=dict(name='speakers'), length=8, labels=4, batch_size=8)}
AUGMENTATION = {'flip': {}, 'pad_crop': dict(padding=1), 'brightness': dict(max_delta=.1),
                'contrast': dict(lower=.5, upper=1.), 'saturation': dict(lower=.5, upper=1.),
                'rotate': dict(max_degrees=9.)}
ROOMS = {'source': (SOURCES, SOURCE), 'tokenizer': (TOKENIZERS, TOKENIZER), 'pipeline': (PIPELINES, PIPELINE),
         'augmentation': (AUGMENTATIONS, AUGMENTATION)}
# Keys that may be 0; no other numeric key may.
ZERO = {'threads', 'split_seed', 'data_seed', 'padding', 'max_delta', 'lower', 'max_degrees', 'noise', 'mean'}


def build(room, name, **changes):
  registry, configs = ROOMS[room]
  return registry.build({'name': name, **configs[name], **changes}, 'config.here')


def numbers():
  """(room, name, key) of every numeric key."""
  for room, (registry, _) in ROOMS.items():
    for name in registry:
      for key, parameter in inspect.signature(registry[name]).parameters.items():
        if re.search('int|float', str(parameter.annotation)):
          yield room, name, key


@pytest.mark.parametrize('room', ROOMS)
def test_these_tests_build_every_name(room):
  registry, configs = ROOMS[room]
  assert set(registry) == set(configs)
  for name in registry:
    build(room, name)


@pytest.mark.parametrize('room, name, key', list(numbers()))
def test_numbers_out_of_range_are_refused_by_their_key(room, name, key):
  for value in (-3, 0, 2**31, 1e400, float('nan')):
    if value == 0 and key in ZERO or value == -3 and key == 'mean':
      build(room, name, **{key: value})
    else:
      # Bounds are checked together: a `lower` above `upper` may be reported for either key.
      with pytest.raises(ConfigError, match=rf'^config\.here\.({key}|{"upper" if key == "lower" else key})\b'):
        build(room, name, **{key: value})


@pytest.mark.parametrize('changes, sentence', [
    (dict(batch_size=-3), 'config.data.batch_size must be an int of at least 1, not -3'),
    (dict(std=0.), 'config.data.std must be a float above 0'), (dict(std=(0.,)), 'config.data.std must be a float'),
    (dict(mean=('a',)), 'config.data.mean must be a float or a tuple'),
    (dict(channels=4), 'channels must be one of 1, 3'),
    (dict(augment=(dict(name='contrast', lower=2., upper=1.),)),
     r'augment\[0\].upper must be .* of at least lower'),
    (dict(source=dict(name='speakers', min_phones=5)), 'min_phones = 5 must be at most max_phones, 4'),
    (dict(source=dict(name='text', files={})), 'source.files must be a string that is not empty or a dict that is not'),
    (dict(source=dict(name='text', files='')), 'source.files must be a string that is not empty'),
    (dict(source=dict(name='jsonl', files=dict(train=3))),
     'source.files.train must be a non-empty string, not 3'),
    (dict(source=dict(name='huggingface', dataset='x', fields=dict(text=['a']), partitions=dict(train='x'))),
     'source.fields.text must be a non-empty string'),
    (dict(source=dict(name='tfds', dataset='x', fields=dict(text='a'), partitions=dict(train=None))),
     'source.partitions.train must be a non-empty string'),
    (dict(source=dict(name='array_record', path='x', splits=())), 'source.splits must be a tuple'),
    (dict(source=dict(name='array_record', path='x', splits=(3,))), 'source.splits must be a tuple')])
def test_invalid_values_are_refused_in_a_sentence(changes, sentence):
  with pytest.raises(ConfigError, match=sentence):
    data.build({'name': 'images', **PIPELINE['images'], **changes})


def test_the_longest_text_to_corrupt_is_found_fast():
  from moejax.data.span_corruption import corrupted_lengths, noise_counts
  tokens, targets = corrupted_lengths(2**31 - 1, 0.15, 3.0)
  for more, fits in ((0, True), (1, False)):
    noise, spans = noise_counts(tokens + more, 0.15, 3.0)
    assert (tokens + more - noise + spans + 1 <= 2**31 - 1) == fits
  assert targets == sum(noise_counts(tokens, 0.15, 3.0)) + 1
