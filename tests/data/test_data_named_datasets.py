"""tensorflow_datasets and Hugging Face datasets, on data written by the tests; nothing is downloaded."""
import io
import json

import numpy as np
import pytest
from PIL import Image

from moejax import data
from moejax.config import ConfigError
from moejax.data import SOURCES, DataError

TEXTS = [f'document {index}' * (index % 5 + 1) for index in range(23)]


def png(value):
  file = io.BytesIO()
  Image.fromarray(np.full((6, 5, 3), value, np.uint8)).save(file, 'PNG')
  return file.getvalue()


@pytest.fixture(scope='module')
def parquet(tmp_path_factory):
  import datasets
  folder = tmp_path_factory.mktemp('parquet')
  datasets.disable_progress_bars()
  datasets.Dataset.from_dict({'body': TEXTS}).to_parquet(folder / 'text.parquet')
  pictures = datasets.Dataset.from_dict({'picture': [png(i) for i in range(4)], 'y': [0, 1, 2, 0]})
  pictures.cast_column('picture', datasets.Image(decode=False)).cast_column('picture', datasets.Image()).to_parquet(
      folder / 'images.parquet')
  return folder


def text_source(parquet, **config):
  return dict(name='huggingface', dataset='parquet', files=dict(train=str(parquet / 'text.parquet')),
              fields=dict(text='body'), partitions=dict(train='train', test='train'), **config)


def test_parquet_files_are_read_by_index(parquet):
  examples = SOURCES.build(text_source(parquet), 'source').open('train')
  assert [examples[index]['text'] for index in range(len(examples))] == TEXTS


def test_files_in_the_home_folder_are_found(parquet, monkeypatch):
  monkeypatch.setenv('HOME', str(parquet))
  for files in ('~/text.parquet', ['~/text.parquet']):
    config = {**text_source(parquet), 'files': dict(train=files)}
    assert len(SOURCES.build(config, 'source').open('train')) == len(TEXTS)


def test_images_of_parquet_files_stay_encoded_until_they_are_cropped(parquet):
  pipeline = data.build(dict(
      name='images', image_size=4, channels=3, batch_size=4, mean=0, std=1,
      source=dict(name='huggingface', dataset='parquet', files=dict(train=str(parquet / 'images.parquet')),
                  fields=dict(image='picture', label='y'), partitions=dict(train='train'), num_classes=3)))
  assert isinstance(pipeline.open('train')[0]['image'], bytes)
  batch, = pipeline.evaluate('train')
  np.testing.assert_allclose(batch['image'][:, 0, 0, 0] * 255, [0, 1, 2, 3], atol=1e-5)  # float32 of value / 255
  assert batch['label'].tolist() == [0, 1, 2, 0]


def test_a_stream_gives_every_document_and_resumes_exactly(parquet):
  stream = SOURCES.build(text_source(parquet, streaming=True), 'source').open('train')
  assert [example['text'] for example in stream] == TEXTS
  iterator = iter(stream)
  for _ in range(7):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  rest = [example['text'] for example in iterator]
  again = iter(stream)
  next(again)
  again.set_state(state)
  assert [example['text'] for example in again] == rest == TEXTS[7:]


def test_shares_of_a_stream_are_disjoint_and_cover_it(parquet):
  stream = SOURCES.build(text_source(parquet, streaming=True), 'source').open('train')
  shares = [[example['text'] for example in stream.shard(index, 3)] for index in range(3)]
  assert sorted(sum(shares, [])) == sorted(TEXTS)


def test_training_on_a_stream_repeats_shuffles_and_resumes_exactly(parquet):
  pipeline = data.build(dict(
      name='language_model', source=text_source(parquet, streaming=True, shuffle_window=8),
      tokenizer=dict(name='bytes'), length=16, batch_size=4, shuffle_batches=2))
  batches = pipeline.train(seed=1)
  for _ in range(30):  # 23 documents are about 10 batches
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(15)]
  resumed = pipeline.train(seed=1)
  resumed.set_state(state)
  for batch in expected:
    for name, value in next(resumed).items():
      np.testing.assert_array_equal(value, batch[name])


def test_training_on_a_stream_of_images_resumes_with_the_same_crops(parquet):
  pipeline = data.build(dict(
      name='images', image_size=4, channels=3, batch_size=2, crop='inception',
      source=dict(name='huggingface', dataset='parquet', files=dict(train=str(parquet / 'images.parquet')),
                  fields=dict(image='picture', label='y'), partitions=dict(train='train'), num_classes=3,
                  streaming=True)))
  batches = pipeline.train(seed=1)
  for _ in range(3):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = next(batches)
  batches.set_state(state)
  for name, value in next(batches).items():
    np.testing.assert_array_equal(value, expected[name])
  padded, = pipeline.evaluate('train', batch_size=6)
  assert padded['valid'].tolist() == [True] * 4 + [False] * 2


def test_hub_errors_say_what_to_change(parquet):
  with pytest.raises(ConfigError, match='fields: parquet has no field words. Allowed: body'):
    SOURCES.build({**text_source(parquet), 'fields': dict(text='words')}, 'source').open('train')
  with pytest.raises(DataError, match='none.parquet.* cannot be loaded'):
    SOURCES.build({**text_source(parquet), 'files': dict(train=str(parquet / 'none.parquet'))}, 'source').open('train')
  with pytest.raises(ConfigError, match='source.fields must be a dict that is not empty'):
    SOURCES.build({**text_source(parquet), 'fields': {}}, 'source')
  with pytest.raises(ConfigError, match='source.fields must name the field that holds `image`, `text` or `tokens`'):
    SOURCES.build({**text_source(parquet), 'fields': dict(label='y')}, 'source')


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('content', [b'PAR1 nonsense PAR1', b'', None])
def test_a_corrupt_file_is_named_whenever_it_is_noticed(parquet, tmp_path, content, streaming):
  whole = (parquet / 'text.parquet').read_bytes()
  (tmp_path / 'broken.parquet').write_bytes(whole[:40] + b'\0' * 20 + whole[60:] if content is None else content)
  config = text_source(parquet, streaming=streaming)
  with pytest.raises(DataError, match=r"broken.parquet'\} split 'train'.*: cannot be (loaded|read) \("):
    examples = SOURCES.build({**config, 'files': dict(train=str(tmp_path / 'broken.parquet'))}, 'source').open('train')
    list(examples)


@pytest.mark.parametrize('streaming', [False, True])
def test_a_null_text_is_refused_with_its_place(tmp_path, streaming):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": null}\n')
  source = dict(name='huggingface', dataset='json', files=dict(train=str(tmp_path / 'a.jsonl')), fields=dict(text='text'),
                partitions=dict(train='train'), streaming=streaming)
  pipeline = data.build(dict(name='language_model', source=source, tokenizer=dict(name='bytes'), length=4, batch_size=1))
  where = '^config.data.source: ' if streaming else r"a.jsonl'\} split 'train', example 1: "
  with pytest.raises(DataError, match=where + 'cannot be tokenized .*its text is None, not a string'):
    list(pipeline.evaluate('train'))


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A data set of tensorflow_datasets, prepared as array_record, without TensorFlow."""
  import tensorflow_datasets as tfds

  class MoejaxTiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = tfds.features.FeaturesDict({'pixels': tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
                                             'y': tfds.features.ClassLabel(num_classes=3)})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(7), 'validation': self._generate_examples(3)}

    def _generate_examples(self, count):
      for index in range(count):
        yield index, {'pixels': np.full((4, 4, 1), index, np.uint8), 'y': index % 3}

  folder = tmp_path_factory.mktemp('tfds')
  tfds.disable_progress_bar()
  MoejaxTiny(data_dir=folder, file_format='array_record').download_and_prepare()
  return str(folder)


def tfds_source(data_dir, **config):
  return {**dict(name='tfds', dataset='moejax_tiny', data_dir=data_dir, fields=dict(image='pixels', label='y'),
                 partitions=dict(train='train[:5]', test='validation'), num_classes=3), **config}


def test_a_prepared_tfds_data_set_feeds_a_pipeline(prepared):
  pipeline = data.build(dict(name='images', source=tfds_source(prepared), image_size=4, channels=1, batch_size=4))
  assert pipeline.describe()['examples'] == {'train': 5, 'test': 3}
  batch, = pipeline.evaluate('test')
  # TFDS stores examples in its own order; a picture keeps its label.
  values = np.round((batch['image'][:3, 0, 0, 0] * .5 + .5) * 255).astype(int)
  assert sorted(values) == [0, 1, 2] and (batch['label'][:3] == values % 3).all()


def test_tfds_errors_say_what_to_do(prepared, tmp_path):
  with pytest.raises(DataError, match='moejax_tiny is not prepared as array_record .* download=True'):
    SOURCES.build(tfds_source(str(tmp_path)), 'source').open('train')
  with pytest.raises(DataError, match="tensorflow_datasets has no builder for 'moejax_none'"):
    SOURCES.build(tfds_source(prepared, dataset='moejax_none'), 'source').open('train')
  with pytest.raises(ConfigError, match='has no field image. Allowed: pixels, y'):
    SOURCES.build(tfds_source(prepared, fields=dict(image='image')), 'source').open('train')
