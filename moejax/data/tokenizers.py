"""Tokenizers: documents as ids, with the number of bytes of text that each id stands for.

`vocab_size` is part of the config, so that a model can be built without the tokenizer's file.
"""
import abc
import dataclasses
from collections.abc import Iterator

import numpy as np

from moejax.config import Registry, config_path
from moejax.data.source import DataError, Example, whole_numbers
from moejax.ranges import Count

# In characters; until a piece is packed, it takes about a hundred times as many bytes.
_LONGEST_PIECE = 1 << 20

Piece = tuple[np.ndarray, np.ndarray]


class Tokenizer(abc.ABC):
  """Documents <-> ids.

  Attributes:
    where: config path.
    path: file of the tokenizer.
    vocab_size: all ids are below it, `start` and `end` too.
    start: the id that the first token is predicted from.
    end: the id predicted after the last token; None if documents have no end token.
  """
  where: str
  vocab_size: int
  start: int
  end: int | None

  @abc.abstractmethod
  def encode(self, document: Example) -> Piece:
    """Ids <int32>[n] of a document, without start and end, and the number of bytes of each, <int32>[n].

    The bytes sum to the length of the text in UTF-8. Text never becomes a special token, even if it spells one.
    """

  def pieces(self, document: Example) -> Iterator[Piece]:
    """Encodes a long text lazily, in pieces that begin with white space if possible."""
    text = document.get('text')
    if not isinstance(text, str):
      yield self.encode(document)
      return
    start = 0
    while len(text) - start > _LONGEST_PIECE:
      bound = start + _LONGEST_PIECE
      stop = max(text.rfind(' ', start + 1, bound), text.rfind('\n', start + 1, bound))
      stop = stop if stop > 0 else bound
      yield self.encode({**document, 'text': text[start:stop]})
      start = stop
    yield self.encode({**document, 'text': text[start:]})

  @abc.abstractmethod
  def decode(self, ids: np.ndarray) -> str:
    """The text of ids; `start` and `end` are left out."""

  def fingerprint(self) -> dict[str, str]:
    """A fingerprint, as `Source.fingerprint`, to detect changes; {} if the ids follow from the config alone."""
    return {}

  def text(self, document: Example) -> str:
    if 'text' not in document:
      raise DataError(f'{self.where}: the source gives {", ".join(document)}, not text. '
                      "Use the tokenizer 'ids' for tokenized documents.")
    if not isinstance(document['text'], str):
      raise TypeError(f'its text is {document["text"]!r:.40}, not a string')
    # JSON can spell half of a surrogate pair, which UTF-8 cannot encode.
    return document['text'].encode('utf-8', errors='replace').decode('utf-8')


TOKENIZERS = Registry('tokenizer', Tokenizer)


@TOKENIZERS('bytes')
@dataclasses.dataclass(frozen=True)
class Bytes(Tokenizer):
  """UTF-8 bytes: ids 0 to 255 are the bytes, 256 is the start, 257 the end."""
  where: str = dataclasses.field(init=False, default_factory=config_path)
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
  """Tokenized documents of ids below `num_ids`; `num_ids` is the start, and there is no end.

  Every id counts as one byte, so that bits per byte are bits per id.

  Config keys:
    num_ids: number of ids.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  num_ids: Count
  end = None

  @property
  def vocab_size(self):
    return self.num_ids + 1

  @property
  def start(self):
    return self.num_ids

  def encode(self, document):
    if 'tokens' not in document:
      raise DataError(f'{self.where}: the source gives {", ".join(document)}, not tokens. Use another tokenizer.')
    ids = whole_numbers(document['tokens'])
    if ids.ndim != 1:
      raise ValueError(f'its tokens have the shape {ids.shape}, not [n]')
    if ids.size and not 0 <= ids.min() <= ids.max() < self.num_ids:
      raise DataError(f'{self.where}.num_ids is {self.num_ids}, but a document has ids from {ids.min()} to '
                      f'{ids.max()}. Set it above the largest.')
    return ids.astype(np.int32), np.ones(len(ids), np.int32)

  def decode(self, ids):
    return ' '.join(str(id) for id in np.asarray(ids) if id != self.start)
