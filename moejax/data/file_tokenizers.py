"""Tokenizers whose vocabulary is a file: 'sentencepiece' and 'huggingface'."""
import abc
import dataclasses
import functools
import itertools
import json
import os
from typing import Annotated

import numpy as np

from moejax.config import config_path
from moejax.data import fingerprint
from moejax.data.files import Path, local_path
from moejax.data.source import DataError, decoding, require
from moejax.data.tokenizers import TOKENIZERS, Tokenizer
from moejax.ranges import Count, NotEmpty


class _FromFile(Tokenizer):
  """Tokenizers whose file is read on first use.

  Config keys:
    vocab_size: the largest id in the file plus one.
  """
  path: str

  def fingerprint(self):
    return {f'tokenizer {part}': found for part, found in fingerprint.of_files([self._file()]).items()}

  @abc.abstractmethod
  def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids <int>[n] of a text, and the (exclusive) end of each in characters, <int>[n]."""

  @property
  @abc.abstractmethod
  def special(self) -> np.ndarray:
    """<int>[n]: ids that must not encode text."""

  def encode(self, document):
    text = self.text(document)
    ids, ends = self._plain(text)
    code = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    sizes = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000).astype(np.int64)
    return ids.astype(np.int32), byte_counts(np.append(0, np.cumsum(sizes))[ends], int(sizes.sum()))

  def _plain(self, text):
    """`spans`, where text that spells a special token is cut after its first character until none is left."""
    ids, ends = self.spans(text)
    found = np.flatnonzero(np.isin(ids, self.special))
    if not found.size:
      return ids, ends
    begins = np.append(0, ends)[found]
    cuts = [0, *sorted({int(begin) + 1 for begin in begins if begin + 1 < len(text)}), len(text)]
    if len(cuts) == 2:
      raise ValueError(f'{self.path} encodes {text!r:.40} as the special token {ids[found[0]]}, and it cannot be split')
    parts = [(start, *self._plain(text[start:stop])) for start, stop in itertools.pairwise(cuts)]
    return tuple(np.concatenate(arrays) for arrays in zip(*((part, ends + start) for start, part, ends in parts)))

  def _file(self):
    path = local_path(self.path, f'{self.where}.path')
    if not os.path.isfile(path):
      raise DataError(f'{self.where}.path: there is no tokenizer file {path}.')
    return path

  def _check_size(self, size):
    if size != self.vocab_size:
      raise DataError(f'{self.where}.vocab_size is {self.vocab_size}, but the largest id in {self.path} is '
                      f'{size - 1}. Set it to {size}.')


@TOKENIZERS('sentencepiece')
@dataclasses.dataclass(frozen=True)
class SentencePiece(_FromFile):
  """A SentencePiece model file (T5, Llama, Mixtral).

  The start is the file's `<s>`, else its padding (T5's convention), else its end.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  path: Path
  vocab_size: Count

  @functools.cached_property
  def _model(self):
    module = require('sentencepiece', 'sentencepiece', 'The tokenizer sentencepiece')
    path = self._file()
    with decoding(path, 'not a SentencePiece model'):
      model = module.SentencePieceProcessor(model_file=path)
    self._check_size(model.vocab_size())
    return model

  @property
  def start(self):
    return next(id for id in (self._model.bos_id(), self._model.pad_id(), self._model.eos_id()) if id >= 0)

  @property
  def end(self):
    return self._model.eos_id() if self._model.eos_id() >= 0 else None

  @functools.cached_property
  def special(self):
    return np.array([id for id in range(self.vocab_size) if self._model.is_control(id)])

  def spans(self, text):
    pieces = self._model.encode(text, return_type='proto').pieces
    ends = np.cumsum([len(piece.surface) for piece in pieces], dtype=np.int64)
    return np.array([piece.id for piece in pieces], np.int64), ends

  def decode(self, ids):
    return self._model.decode([int(id) for id in ids if id not in (self.start, self.end)])


@TOKENIZERS('huggingface')
@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(_FromFile):
  """A `tokenizer.json` of Hugging Face's tokenizers.

  Config keys:
    end_token: the token that ends documents.
    start_token: the token that documents start from; None: the end token, as in GPT-2.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  path: Path
  vocab_size: Count
  end_token: Annotated[str, NotEmpty()]
  start_token: Annotated[str, NotEmpty()] | None = None

  @functools.cached_property
  def _model(self):
    module = require('tokenizers', 'tokenizers', 'The tokenizer huggingface')
    path = self._file()
    with decoding(path, 'not a tokenizer.json'):
      model = module.Tokenizer.from_file(path)
      self._check_size(max(model.get_vocab().values()) + 1)
    model.no_padding()
    model.no_truncation()
    model.encode_special_tokens = True  # as ordinary text
    return model

  @property
  def start(self):
    return self._id(self.start_token or self.end_token)

  @property
  def end(self):
    return self._id(self.end_token)

  @functools.cached_property
  def special(self):
    # A vocabulary may contain special tokens itself, and the file may not mark start and end as special.
    special = {id for id, token in self._model.get_added_tokens_decoder().items() if token.special}
    return np.array(sorted((special - {self._unknown()}) | {self.start, self.end}))

  def _unknown(self):
    model = json.loads(self._model.to_str())['model']
    if isinstance(model.get('unk_token'), str):
      return self._model.token_to_id(model['unk_token'])
    return model.get('unk_id')

  def _id(self, token):
    id = self._model.token_to_id(token)
    if id is None:
      raise DataError(f'{self.where}: {self.path} has no token {token!r}.')
    return id

  def spans(self, text):
    encoding = self._model.encode(text, add_special_tokens=False)
    # Tokens of a byte-level vocabulary may share a character.
    return np.array(encoding.ids, np.int64), np.array([end for _, end in encoding.offsets], np.int64)

  def decode(self, ids):
    return self._model.decode([int(id) for id in ids if id not in (self.start, self.end)], skip_special_tokens=False)


def byte_counts(ends: np.ndarray, total: int) -> np.ndarray:
  """The number of the `total` bytes that each token stands for, <int32>[n], from its (exclusive) end in bytes.

  Bytes covered by several tokens count for the first of them, bytes covered by none for the next token, or for the last
  at the end of the text: every byte is counted once.
  """
  if not len(ends):
    return np.zeros(0, np.int32)
  ends = np.maximum.accumulate(ends)
  ends[-1] = total
  return np.diff(ends, prepend=0).astype(np.int32)
