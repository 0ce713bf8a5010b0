"""The pipeline 'images': order, shares, resuming, padding, and batches that match the config."""
import dataclasses
import itertools
import json

import ml_collections
import numpy as np
import pytest
from PIL import Image

from moejax import data
from moejax.config import ConfigError
from moejax.data import DataError
from moejax.data.source import Arrays, Source

DIGITS = dict(name='images', source=dict(name='digits', test_examples=90), image_size=8, channels=1, batch_size=50)


@dataclasses.dataclass
class Held(Source):
  """Examples given by a test, the same in both splits."""
  examples: object
  where: str = 'config.data.source'
  num_classes: int = 10

  def open(self, split):
    self.check_split(split)
    return self.examples


def build(examples=None, **changes):
  pipeline = data.build({**DIGITS, **changes})
  if examples is not None:
    pipeline.source = Held(examples)
  return pipeline


def numbered(count, **changes):
  """A pipeline over 1x1 images whose pixel is the index of the example / 1000; the label is its parity."""
  numbers = np.arange(count)
  examples = Arrays(image=(numbers / 1000).astype(np.float32).reshape(-1, 1, 1), label=(numbers % 2).astype(np.int32))
  return build(examples, image_size=1, mean=0, std=.001, **changes)


def numbers_of(batch):
  return np.round(batch['image'].ravel()).astype(int).tolist()


def assert_equal(batch, expected):
  assert batch.keys() == expected.keys()
  for name in batch:
    np.testing.assert_array_equal(batch[name], expected[name])


def assert_spec(pipeline, batch, batch_size=None):
  spec = pipeline.batch_spec(batch_size)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {n: (s.shape, s.dtype) for n, s in spec.items()}


def test_batches_match_batch_spec():
  pipeline = build()
  assert_spec(pipeline, next(pipeline.train(0)))
  for batch in pipeline.evaluate('test', batch_size=32):
    assert_spec(pipeline, batch, 32)


def test_a_config_dict_builds_the_same_pipeline():
  config = ml_collections.ConfigDict({**DIGITS, 'augment': (dict(name='flip'), dict(name='pad_crop', padding=1))})
  assert_equal(next(data.build(config).train(3)), next(build().train(3)))


@pytest.mark.parametrize('threads', [0, 2])
def test_every_example_is_seen_once_per_epoch_with_its_label(threads):
  batches = numbered(24, batch_size=10, threads=threads).train(5)
  taken = list(itertools.islice(batches, 12))  # five epochs
  numbers = sum(map(numbers_of, taken), [])
  epochs = [numbers[start:start + 24] for start in range(0, 120, 24)]
  assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 5
  assert all((np.array(numbers_of(batch)) % 2 == batch['label']).all() for batch in taken)


def test_the_order_depends_on_the_seed_alone():
  first = lambda seed: numbers_of(next(numbered(1000).train(seed)))
  assert first(0) == first(0) != first(1)


@pytest.mark.parametrize('threads', [0, 2])
@pytest.mark.parametrize('steps', [0, 1, 7])
def test_a_restored_state_continues_with_the_same_batches_and_any_threads(steps, threads):
  batches = numbered(24, batch_size=10, threads=threads).train(5)
  for _ in range(steps):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(4)]
  resumed = numbered(24, batch_size=10, threads=2 - threads).train(5)
  resumed.set_state(state)
  for batch in expected:
    assert_equal(next(resumed), batch)


@pytest.mark.parametrize('rows', [[0, 1, 2, 3, 4], [7, 8, 9], [0, 3, 5]])
def test_any_rows_of_a_batch_can_be_read_without_the_others(rows):
  whole, some = (numbered(24, batch_size=10).train(5, wanted) for wanted in (None, np.array(rows)))
  for _ in range(6):
    batch = next(whole)
    assert_equal(next(some), {name: x[rows] for name, x in batch.items()})
  assert some.get_state() == whole.get_state()


@pytest.mark.parametrize('count', [1, 2, 5])
def test_evaluation_covers_every_example_once_in_order_and_pads_the_rest(count):
  pipeline = numbered(23, batch_size=10)
  shares = [list(pipeline.evaluate('test', rows=rows)) for rows in np.split(np.arange(10), count)]
  assert {len(share) for share in shares} == {3}
  numbers = []
  for parts in zip(*shares):
    assert {part['image'].shape for part in parts} == {(10 // count, 1, 1, 1)}
    for part in parts:
      valid = part['valid']
      assert not part['image'][~valid].any() and not part['label'][~valid].any()
      numbers += np.array(numbers_of(part))[valid].tolist()
  assert numbers == list(range(23))


def test_evaluation_can_be_repeated():
  evaluation = build().evaluate('test')
  first, second = list(evaluation), list(evaluation)
  assert len(first) == 2
  for one, other in zip(first, second):
    assert_equal(one, other)


def test_pixels_are_normalized_by_mean_and_std():
  plain, = build(mean=0, std=1, batch_size=90).evaluate()
  default, = build(batch_size=90).evaluate()
  assert plain['image'].min() == 0 and plain['image'].max() == 1  # digits use all of 0 to 16
  np.testing.assert_allclose(default['image'], (plain['image'] - .5) / .5, atol=1e-6)  # float32 rounding
  grey, = build(batch_size=90, mean=0, std=1).evaluate()
  colour, = build(batch_size=90, channels=3, mean=(0, .5, 1), std=(1, .5, 2)).evaluate()
  for channel, (mean, std) in enumerate(zip((0, .5, 1), (1, .5, 2))):
    np.testing.assert_allclose(colour['image'][..., channel], (grey['image'][..., 0] - mean) / std, atol=1e-6)


def test_images_of_another_size_are_resized():
  batch, = build(image_size=4, batch_size=90, mean=0, std=1).evaluate()
  digits, = build(batch_size=90, mean=0, std=1).evaluate()
  expected = [Image.fromarray(np.round(image[..., 0] * 255).astype(np.uint8)).resize((4, 4), Image.Resampling.BILINEAR)
              for image in digits['image']]
  np.testing.assert_allclose(batch['image'][..., 0], np.stack(expected) / 255, atol=1e-6)


def test_random_crops_of_a_row_do_not_depend_on_the_other_rows_read():
  config = dict(image_size=6, crop='inception', batch_size=4)
  whole = next(build(**config).train(0))
  parts = [next(build(**config).train(0, rows)) for rows in (np.arange(2), np.arange(2, 4))]
  assert_equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_several_labels_per_image_are_a_row_of_zeros_and_ones():
  examples = [{'image': np.zeros((8, 8), np.uint8), 'label': label} for label in ([1, 9], [], [0])]
  pipeline = build(examples, multi_label=True, batch_size=3)
  batch, = pipeline.evaluate()
  assert_spec(pipeline, batch)
  assert [np.flatnonzero(row).tolist() for row in batch['labels']] == [[1, 9], [], [0]]


@pytest.mark.parametrize('label', [10, -1])
def test_labels_beyond_the_classes_are_refused(label):
  pipeline = build([{'image': np.zeros((8, 8), np.uint8), 'label': label}])
  with pytest.raises(DataError, match=f'has the label {label}, but there are 10 classes'):
    next(pipeline.train(0))


def test_a_split_without_examples_is_refused():
  with pytest.raises(DataError, match="there are no examples in split 'train'"):
    build([]).train(0)


@pytest.mark.parametrize('changes, message', [
    (dict(channels=2), 'config.data.channels must be one of 1, 3, not 2'),
    (dict(batch_size=0), 'config.data.batch_size must be an int of at least 1, not 0'),
    (dict(threads=-1), 'config.data.threads must be an int of at least 0, not -1'),
    (dict(readers=3), 'config.data.readers must be an int of at least 1 and that divides batch_size, not 3'),
    (dict(image_size=0), 'config.data.image_size must be an int of at least 1, not 0'),
    (dict(mean=(0, 0, 0)), 'config.data.mean must be a float or 1 of them, one per channel, not 3'),
    (dict(source=dict(name='digit')), "config.data.source.name: there is no source 'digit'. Did you mean 'digits'"),
    (dict(source=dict(name='digits', seed=1)), 'config.data.source.seed: Digits has no such key'),
    (dict(source=dict(name='array_record', path='x')), 'config.data.source.num_classes is missing'),
    (dict(augment=(dict(name='flop'),)), r'config.data.augment\[0\].name: there is no augmentation .flop'),
    (dict(augment=(dict(name='flip'), dict(name='saturation', lower=0., upper=1.))),
     r'augment\[1\]: saturation requires images of 3'),
    (dict(crop='centre'), "config.data.crop must be one of 'stretch', 'center', 'inception'"),
])
def test_configs_that_cannot_work_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    build(**changes)


def test_a_model_that_does_not_fit_is_refused():
  fits = dict(name='vision', num_classes=10, image_size=8, channels=1)
  pipeline = build()
  pipeline.check(fits)
  pipeline.check({**fits, 'num_classes': 12})
  for changes, message in ((dict(num_classes=9), 'config.model.num_classes is 9, but .* 10 classes'),
                           (dict(image_size=16), 'config.model.image_size is 16, but config.data.image_size is 8'),
                           (dict(channels=3), 'config.model.channels is 3, but config.data.channels is 1')):
    with pytest.raises(ConfigError, match=message):
      pipeline.check({**fits, **changes})
  with pytest.raises(ConfigError, match="gives labelled images, but the model 'decoder' has no num_classes"):
    pipeline.check(dict(name='decoder', vocab_size=3))


def test_an_unknown_split_is_refused():
  with pytest.raises(ConfigError, match="no split 'validation'. Allowed: train, test"):
    build().evaluate('validation')


def test_a_pipeline_describes_its_data():
  assert build().describe() == {'classes': 10, 'image': [8, 8, 1], 'examples': {'train': 1707, 'test': 90}}


def test_paper_scale_configs_build_without_their_data():
  pipeline = build(source=dict(name='tfds', dataset='imagenet2012', data_dir='/none', num_classes=1000,
                               fields=dict(image='image', label='label'),
                               partitions=dict(train='train', test='validation')),
                   image_size=224, channels=3, batch_size=4096, crop='inception', augment=(dict(name='flip'),))
  assert pipeline.batch_spec()['image'].shape == (4096, 224, 224, 3) and pipeline.splits == ('train', 'test')
  pipeline.check(dict(name='vision', num_classes=1000, image_size=224, channels=3))
