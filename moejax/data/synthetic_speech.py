"""Synthetic speech that can only be transcribed by identifying the speaker."""
import dataclasses
import functools
from typing import Annotated

import numpy as np

from moejax.config import ConfigError, config_path
from moejax.data.source import SOURCES, Source
from moejax.data.speech import LETTERS
from moejax.data.speech_files import Recordings
from moejax.ranges import Between, Count, Natural, NonNegative

_SPLIT_STREAM = {'train': 1, 'test': 2}


@SOURCES('speakers')
@dataclasses.dataclass(frozen=True)
class Speakers(Source):
  """Sequences of phones, each a few frames of a sound plus noise. Speakers use the same sounds for different phones.

  `tables` maps the phones of a speaker to sounds. Only the first frames, which hold the speaker's own sound alone,
  identify the speaker. So the best expert of a frame follows from the speaker, and the speaker only from the context.
  The text spells phone i as letter i.

  Config keys:
    num_features: values per frame.
    num_speakers: number of speakers.
    num_phones: number of phones, and of sounds; each phone is a letter.
    min_phones, max_phones: bounds of the number of phones per recording, drawn uniformly.
    frames_per_phone: frames of each phone.
    noise: standard deviation of the Gaussian noise; sounds have 1.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  num_features: Count = 13
  num_speakers: Count = 4
  num_phones: Annotated[int, Between(1, 26)] = 6
  min_phones: Count = 2
  max_phones: Count = 4
  frames_per_phone: Count = 3
  noise: NonNegative = 0.3
  train_examples: Count = 2048
  test_examples: Count = 256
  data_seed: Natural = 0

  def __post_init__(self):
    if self.min_phones > self.max_phones:
      raise ConfigError(f'.min_phones = {self.min_phones} must be at most max_phones, {self.max_phones}.')

  def open(self, split):
    self.check_split(split)
    rng = np.random.default_rng((self.data_seed, _SPLIT_STREAM[split]))
    count = {'train': self.train_examples, 'test': self.test_examples}[split]
    said = [rng.integers(self.num_phones, size=rng.integers(self.min_phones, self.max_phones + 1)) for _ in range(count)]
    speakers = self.speakers(split)
    sounds, voices = self.sounds
    clean = [np.concatenate([voices[[who]], sounds[self.tables[who, phones]]]).repeat(self.frames_per_phone, axis=0)
             for who, phones in zip(speakers, said)]
    frames = np.concatenate(clean)
    frames += self.noise * rng.normal(size=frames.shape)
    return Recordings(frames.astype(np.float32), np.array([len(one) for one in clean]),
                      [''.join(LETTERS[phone] for phone in phones) for phones in said])

  def speakers(self, split: str) -> np.ndarray:
    """<int>[N]: the speaker of each recording."""
    count = {'train': self.train_examples, 'test': self.test_examples}[split]
    return np.random.default_rng((self.data_seed, _SPLIT_STREAM[split], 0)).integers(self.num_speakers, size=count)

  @functools.cached_property
  def tables(self) -> np.ndarray:
    """<int>[speakers, phones]: the sound of each phone, one permutation per speaker."""
    rng = np.random.default_rng((self.data_seed, 3))
    return np.stack([rng.permutation(self.num_phones) for _ in range(self.num_speakers)])

  @functools.cached_property
  def sounds(self) -> tuple[np.ndarray, np.ndarray]:
    """Sounds of phones [phones, C] and of speakers [speakers, C], with entries of variance 1."""
    rng = np.random.default_rng((self.data_seed, 4))
    return rng.normal(size=(self.num_phones, self.num_features)), rng.normal(size=(self.num_speakers, self.num_features))
