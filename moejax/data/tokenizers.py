"""Tokenizers: documents as ids, and how many bytes of text each id stands for.

`vocab_size` is part of the config, so that a model can be built where the tokenizer's file is not.
"""
import abc
import dataclasses
import functools
import os

import numpy as np

from moejax.config import Registry
from moejax.data import fingerprint
from moejax.data.source import DataError, Example, require

TOKENIZERS = Registry('tokenizer')


class Tokenizer(abc.ABC):
  """Documents <-> ids.

  Attributes:
    where: config path.
    vocab_size: all ids are below it, `start` and `end` too.
    start: the id that the first token is predicted from.
    end: the id predicted after the last token; None where documents do not end.
  """
  where: str
  vocab_size: int
  start: int
  end: int | None

  @abc.abstractmethod
  def encode(self, document: Example) -> tuple[np.ndarray, np.ndarray]:
    """Ids <int32>[n] of a document, without start and end, and the bytes that each stands for <int32>[n].

    The bytes sum to the length of the text in UTF-8.
    """

  @abc.abstractmethod
  def decode(self, ids: np.ndarray) -> str:
    """The text of ids; `start` and `end` are left out."""

  def fingerprint(self) -> dict[str, str]:
    """As of a source: what tells whether the ids of a text are still the same. Here: they follow from the config."""
    return {}

  def text(self, document: Example) -> str:
    if 'text' not in document:
      raise DataError(f'{self.where}: the source gives {", ".join(document)} and not text. '
                      "Use the tokenizer 'ids' for documents that are tokenized already.")
    # Half of a surrogate pair, which JSON can spell, is no character of UTF-8.
    return document['text'].encode('utf-8', errors='replace').decode('utf-8')


@TOKENIZERS('bytes')
@dataclasses.dataclass(frozen=True)
class Bytes(Tokenizer):
  """UTF-8: ids 0 to 255 are the bytes themselves, 256 is the start, 257 the end."""
  where: str
  vocab_size = 258
  start = 256
  end = 257

  def encode(self, document):
    raw = self.text(document).encode('utf-8')
    return np.frombuffer(raw, np.uint8).astype(np.int32), np.ones(len(raw), np.int32)

  def decode(self, ids):
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes().decode('utf-8', errors='replace')


@TOKENIZERS('ids')
@dataclasses.dataclass(frozen=True)
class Ids(Tokenizer):
  """Documents that are ids already, below `num_ids`; `num_ids` itself is the start, and documents do not end.

  Every id counts as one byte, so that bits per byte are bits per id.

  Config:
    num_ids: number of ids.
  """
  where: str
  num_ids: int
  end = None

  @property
  def vocab_size(self):
    return self.num_ids + 1

  @property
  def start(self):
    return self.num_ids

  def encode(self, document):
    if 'tokens' not in document:
      raise DataError(f'{self.where}: the source gives {", ".join(document)} and not tokens. Use another tokenizer.')
    ids = np.asarray(document['tokens'], np.int32)
    if ids.size and not 0 <= ids.min() <= ids.max() < self.num_ids:
      raise DataError(f'{self.where}.num_ids is {self.num_ids}, but a document has ids from {ids.min()} to '
                      f'{ids.max()}. Set it above the largest.')
    return ids, np.ones(len(ids), np.int32)

  def decode(self, ids):
    return ' '.join(str(id) for id in np.asarray(ids) if id != self.start)


class _FromFile(Tokenizer):
  """Tokenizers whose file is read at the first use.

  Config:
    path: of the file.
    vocab_size: ids that the file must have.
  """
  path: str

  def fingerprint(self):
    return {f'tokenizer {part}': found for part, found in fingerprint.of_files([self._checked_path()]).items()}

  def _checked_path(self):
    path = os.path.expanduser(self.path)
    if not os.path.isfile(path):
      raise DataError(f'{self.where}.path: there is no tokenizer file {path}.')
    return path

  def _check_size(self, size):
    if size != self.vocab_size:
      raise DataError(f'{self.where}.vocab_size is {self.vocab_size}, but {self.path} has {size} ids. '
                      f'Set it to {size}.')


@TOKENIZERS('sentencepiece')
@dataclasses.dataclass(frozen=True)
class SentencePiece(_FromFile):
  """A SentencePiece model file (T5, Llama, Mixtral).

  The start is the file's `<s>`, else its padding (T5's convention), else its end.
  """
  where: str
  path: str
  vocab_size: int

  @functools.cached_property
  def _model(self):
    module = require('sentencepiece', 'sentencepiece', 'The tokenizer sentencepiece')
    path = self._checked_path()
    try:
      model = module.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
      raise DataError(f'{path}: not a SentencePiece model ({error}).') from error
    self._check_size(model.vocab_size())
    return model

  @property
  def start(self):
    return next(id for id in (self._model.bos_id(), self._model.pad_id(), self._model.eos_id()) if id >= 0)

  @property
  def end(self):
    return self._model.eos_id() if self._model.eos_id() >= 0 else None

  def encode(self, document):
    text = self.text(document)
    pieces = self._model.encode(text, return_type='proto').pieces
    ends = np.cumsum([len(piece.surface.encode('utf-8')) for piece in pieces])
    return np.array([piece.id for piece in pieces], np.int32), byte_counts(ends, len(text.encode('utf-8')))

  def decode(self, ids):
    return self._model.decode([int(id) for id in ids if id not in (self.start, self.end)])


@TOKENIZERS('huggingface')
@dataclasses.dataclass(frozen=True)
class HuggingFace(_FromFile):
  """A `tokenizer.json` of Hugging Face's tokenizers; `end_token` and `start_token` are tokens in it.

  Without `start_token` documents start from the end token, as GPT-2's do.

  Config:
    end_token: ends documents.
    start_token: starts them; None: the end token does.
  """
  where: str
  path: str
  vocab_size: int
  end_token: str
  start_token: str | None = None

  @functools.cached_property
  def _model(self):
    module = require('tokenizers', 'tokenizers', 'The tokenizer huggingface')
    path = self._checked_path()
    try:
      model = module.Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exceptions
      raise DataError(f'{path}: not a tokenizer.json ({error}).') from error
    self._check_size(model.get_vocab_size())
    model.no_padding()
    model.no_truncation()
    return model

  @property
  def start(self):
    return self._id(self.start_token or self.end_token)

  @property
  def end(self):
    return self._id(self.end_token)

  def _id(self, token):
    id = self._model.token_to_id(token)
    if id is None:
      raise DataError(f'{self.where}: {self.path} has no token {token!r}.')
    return id

  def encode(self, document):
    text = self.text(document)
    encoding = self._model.encode(text, add_special_tokens=False)
    # Offsets count characters; tokens of a byte-level vocabulary may share one.
    ends = np.cumsum([0, *(len(character.encode('utf-8')) for character in text)])[[end for _, end in encoding.offsets]]
    return np.array(encoding.ids, np.int32), byte_counts(ends, len(text.encode('utf-8')))

  def decode(self, ids):
    return self._model.decode([int(id) for id in ids if id not in (self.start, self.end)], skip_special_tokens=False)


def byte_counts(ends: np.ndarray, total: int) -> np.ndarray:
  """How many of `total` bytes each token stands for, <int32>[n], from the byte that each ends before.

  Bytes that several tokens cover go to the first of them, those that none covers to the next, and at the end of the
  text to the last: every byte is counted once.
  """
  if not len(ends):
    return np.zeros(0, np.int32)
  ends = np.maximum.accumulate(ends)
  ends[-1] = total
  return np.diff(ends, prepend=0).astype(np.int32)
