"""Synthetic speech in which one must know the speaker to know what is said."""
import dataclasses
import functools

import numpy as np

from moejax.config import ConfigError
from moejax.data.source import SOURCES, Source
from moejax.data.speech import LETTERS
from moejax.data.speech_files import Recordings

_SPLIT_STREAM = {'train': 1, 'test': 2}


@SOURCES('speakers')
@dataclasses.dataclass(frozen=True)
class Speakers(Source):
  """Sequences of phones, each some frames of a sound and noise. All speakers use the same sounds for other phones.

  Which sound is which phone of a speaker is `tables`; no frame but the first ones, in which the speaker's own sound is
  heard alone, says who speaks. So the best expert of a frame is known by the speaker, and the speaker only from the
  context. The text spells phone i as letter i.

  Config:
    num_features: numbers a frame.
    num_speakers: speakers.
    num_phones: phones, at most the 26 letters.
    min_phones: fewest phones of an utterance.
    max_phones: most phones of an utterance.
    frames_per_phone: how long a phone lasts, in frames.
    noise: standard deviation of the noise.
  """
  where: str
  num_features: int = 13
  num_speakers: int = 4
  num_phones: int = 6
  min_phones: int = 2
  max_phones: int = 4
  frames_per_phone: int = 3
  noise: float = 0.3
  train_examples: int = 2048
  test_examples: int = 256
  data_seed: int = 0

  def __post_init__(self):
    if not 1 <= self.num_phones <= 26:
      raise ConfigError(f'{self.where}.num_phones must lie between 1 and 26, the letters, not {self.num_phones}.')
    if not 1 <= self.min_phones <= self.max_phones:
      raise ConfigError(f'{self.where}: min_phones must lie between 1 and max_phones.')

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
    """<int>[N]: who speaks in each recording."""
    count = {'train': self.train_examples, 'test': self.test_examples}[split]
    return np.random.default_rng((self.data_seed, _SPLIT_STREAM[split], 0)).integers(self.num_speakers, size=count)

  @functools.cached_property
  def tables(self) -> np.ndarray:
    """<int>[speakers, phones]: the sound of each phone, a permutation for each speaker."""
    rng = np.random.default_rng((self.data_seed, 3))
    return np.stack([rng.permutation(self.num_phones) for _ in range(self.num_speakers)])

  @functools.cached_property
  def sounds(self) -> tuple[np.ndarray, np.ndarray]:
    """Sounds of phones [phones, C] and of speakers [speakers, C], all of entries with variance 1."""
    rng = np.random.default_rng((self.data_seed, 4))
    return rng.normal(size=(self.num_phones, self.num_features)), rng.normal(size=(self.num_speakers, self.num_features))
