"""The tokenizer 'hashed_words': whole words as ids, for captions, without a file."""
import dataclasses
import re
import zlib
from typing import Annotated

import numpy as np

from moejax.config import config_path
from moejax.data.tokenizers import TOKENIZERS, Tokenizer
from moejax.ranges import AtLeast


@TOKENIZERS('hashed_words')
@dataclasses.dataclass(frozen=True)
class HashedWords(Tokenizer):
  """The id of a word is its CRC-32 modulo the number of ids: the same everywhere, though words may collide.

  Ids 0 and 1 are the start and the end. Case is ignored. A hash cannot be inverted: `decode` spells ids.

  Config keys:
    vocab_size: number of ids, including the start and the end.
  """
  where: str = dataclasses.field(init=False, default_factory=config_path)
  vocab_size: Annotated[int, AtLeast(3)]
  start = 0
  end = 1

  def encode(self, document):
    text = self.text(document)
    # A word includes the white space around it, so that all bytes are counted.
    words = re.findall(r'^\s*\S+\s*|\S+\s*', text)
    ids = [2 + zlib.crc32(word.strip().lower().encode('utf-8')) % (self.vocab_size - 2) for word in words]
    return np.array(ids, np.int32), np.array([len(word.encode('utf-8')) for word in words], np.int32)

  def decode(self, ids):
    return ' '.join(f'#{id}' for id in np.asarray(ids) if id > 1)
