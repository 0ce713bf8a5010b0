"""Data sets by name: TensorFlow Datasets and the Hugging Face hub. `fields` maps our field names to theirs."""
import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated

import grain

from moejax.config import ConfigError, config_path
from moejax.data.files import check_strings, read_file
from moejax.data.source import SOURCES, DataError, Source, Stream, decoding, require
from moejax.ranges import Count, NotEmpty

Names = Annotated[Mapping, NotEmpty()]


@dataclasses.dataclass(frozen=True)
class _NamedDataset(Source):
  """The base class of both libraries' data sets.

  Attributes:
    dataset: its name.
    fields: our field names -> theirs: `dict(image='image', label='label')` or `dict(text='text')`.
    partitions: our split names -> theirs, in their notation: `dict(train='train[:99%]', test='validation')`.
    num_classes: number of classes of labelled data.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  dataset: Annotated[str, NotEmpty()]
  fields: Names
  partitions: Names
  num_classes: Count | None = None

  def __post_init__(self):
    check_strings(self.fields, '.fields')
    check_strings(self.partitions, '.partitions')
    if not {'image', 'text', 'tokens'} & set(self.fields):
      raise ConfigError(f'.fields must name the field that holds `image`, `text` or `tokens`, '
                        f'not {dict(self.fields)}.')

  @property
  def splits(self) -> tuple[str, ...]:
    return tuple(self.partitions)

  def check_fields(self, available):
    missing = set(self.fields.values()) - set(available)
    if missing:
      raise ConfigError(f'{self.where}.fields: {self.dataset} has no field {", ".join(sorted(missing))}. '
                        f'Allowed: {", ".join(sorted(available))}.')


@SOURCES('tfds')
@dataclasses.dataclass(frozen=True)
class TensorFlowDatasets(_NamedDataset):
  """A data set of tensorflow_datasets (no TensorFlow needed to read it), prepared as ArrayRecord.

  Attributes:
    data_dir: folder of prepared data sets; TFDS's default if None.
    download: download and prepare the data set on first use if it is missing.
  """
  data_dir: str | None = None
  download: bool = False

  def open(self, split):
    self.check_split(split)
    tfds = require('tensorflow_datasets', 'tensorflow-datasets', 'The source tfds')
    builder = self._builder(tfds)
    self.check_fields(builder.info.features)
    # Images stay encoded; Pillow decodes them when they are cropped.
    raw = {name: tfds.decode.SkipDecoding() for name in self.fields.values()
           if isinstance(builder.info.features[name], tfds.features.Image)}
    what = f'{self.dataset} split {self.partitions[split]!r}'
    with decoding(f'{self.where}: {what}', 'cannot be opened'):
      return Renamed(builder.as_data_source(self.partitions[split], decoders=raw), self.fields, what)

  def _builder(self, tfds):
    folder = None if self.data_dir is None else os.path.expanduser(self.data_dir)
    try:
      builder = tfds.builder(self.dataset, data_dir=folder, file_format='array_record')
    except tfds.core.DatasetNotFoundError as error:
      raise DataError(f'{self.where}.dataset: tensorflow_datasets has no builder for {self.dataset!r}, and '
                      f'{folder or "its default folder"} holds no prepared copy.') from error
    if self.download:
      with decoding(f'{self.where}: {self.dataset}', 'cannot be downloaded'):
        builder.download_and_prepare()
    if not builder.is_prepared():
      raise DataError(f'{self.where}: {self.dataset} is not prepared as array_record in {builder.data_dir}. '
                      'Set download=True, or prepare it with: tfds build --file_format=array_record.')
    return builder


@SOURCES('huggingface')
@dataclasses.dataclass(frozen=True)
class HuggingFaceDatasets(_NamedDataset):
  """A data set of the Hugging Face hub, or local files of a format that `datasets` reads (dataset='parquet').

  Attributes:
    subset: the hub's configuration name.
    files: local files or patterns by the hub's split names, with dataset='parquet', 'json', 'csv', ...
    streaming: read over the network in order, storing nothing. Training then shuffles only within a window.
    shuffle_window: size of the window, in examples.
  """
  subset: str | None = None
  files: Mapping | None = None
  streaming: bool = False
  shuffle_window: Count = 1000

  def open(self, split):
    self.check_split(split)
    datasets = require('datasets', 'datasets', 'The source huggingface')
    files = None if self.files is None else {name: _plain(paths) for name, paths in self.files.items()}
    what = f'{self.dataset} {files or ""} split {self.partitions[split]!r}'
    with decoding(f'{self.where}: {what}', 'cannot be loaded'):
      dataset = datasets.load_dataset(self.dataset, self.subset, data_files=files, split=self.partitions[split],
                                      streaming=self.streaming)
    if dataset.features is not None:
      self.check_fields(dataset.features)
      for name in self.fields.values():
        if isinstance(dataset.features[name], datasets.Image):
          dataset = dataset.cast_column(name, datasets.Image(decode=False))
    if self.streaming:
      return HuggingFaceStream(dataset, self.fields, self.shuffle_window, what)
    return Renamed(dataset, self.fields, what)


class Renamed:
  """Examples with fields renamed from the hub's names to ours; `what` names the data set in errors."""

  def __init__(self, examples, fields: Mapping, what: str):
    self._examples, self._fields, self._what = examples, dict(fields), what

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    with decoding(lambda: self.place(index)):
      return rename(self._examples[index], self._fields)

  def place(self, index):
    return f'{self._what}, example {index}'


def rename(example, fields):
  """An example with our field names instead of theirs; an encoded image becomes its bytes."""
  renamed = {ours: example[theirs] for ours, theirs in fields.items()}
  if isinstance(renamed.get('image'), dict):  # Hugging Face: an encoded image and its path
    renamed['image'] = renamed['image']['bytes'] or read_file(renamed['image']['path'])
  return renamed


class HuggingFaceStream(Stream):
  """`datasets.IterableDataset` as a grain dataset."""

  def __init__(self, dataset, fields: Mapping, shuffle_window: int, what: str):
    super().__init__()
    self._dataset, self._fields, self.shuffle_window, self._what = dataset, dict(fields), shuffle_window, what

  def shard(self, index, count):
    distributed = require('datasets.distributed', 'datasets', 'The source huggingface')
    part = distributed.split_dataset_by_node(self._dataset, index, count)
    return HuggingFaceStream(part, self._fields, self.shuffle_window, self._what)

  def __iter__(self):
    return _StreamIterator(self._dataset, self._fields, self._what)


class _StreamIterator(grain.DatasetIterator):

  def __init__(self, dataset, fields, what):
    super().__init__()
    self._pristine, self._fields, self._what = dataset, fields, what
    self._restart()

  def _restart(self, state=None):
    # After `load_state_dict` every later pass starts there too, so each position gets its own copy of the data set.
    self._dataset = copy.deepcopy(self._pristine)
    if state is not None:
      self._dataset.load_state_dict(state)
    self._iterator = iter(self._dataset)

  def __next__(self):
    with decoding(f'{self._what}, an example'):
      return rename(next(self._iterator), self._fields)

  def get_state(self):
    return {'huggingface': self._dataset.state_dict()}

  def set_state(self, state):
    self._restart(state['huggingface'])


def _plain(paths):
  return os.path.expanduser(paths) if isinstance(paths, str) else [os.path.expanduser(path) for path in paths]
