"""Kinds of text tokens, to see which expert takes vowels, digits or line breaks."""
import unicodedata

import numpy as np

KINDS = ('vowel', 'consonant', 'capital letter', 'word or part of one', 'capitalised word', 'digits', 'punctuation',
         'space', 'line break', 'non-ASCII', 'mixed', 'special')
_VOWELS = frozenset('aeiou')


def kind(text: str) -> str:
  """One of `KINDS` for the text of one token; the text of special tokens is empty."""
  word = text.strip()
  if not text:
    return 'special'
  if not word:
    return 'line break' if '\n' in text else 'space'
  if not word.isascii():
    return 'non-ASCII'
  if word.isdigit():
    return 'digits'
  if all(unicodedata.category(character)[0] in 'PS' for character in word):
    return 'punctuation'
  if not word.isalpha():
    return 'mixed'
  if len(word) > 1:
    return 'word or part of one' if word.islower() else 'capitalised word'
  return 'capital letter' if word.isupper() else 'vowel' if word in _VOWELS else 'consonant'


def texts(tokenizer, ids: np.ndarray) -> dict[int, str]:
  """`{id: its text}` of every id in `ids`; '' for special tokens."""
  return {int(id): tokenizer.decode(np.array([id])) for id in np.unique(ids)}


def kinds_of(tokenizer, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
  """(<int>[...]: the kind of each of `ids`, the names of the kinds that occur)."""
  kind_of = {id: kind(text) for id, text in texts(tokenizer, ids).items()}
  present = [name for name in KINDS if name in kind_of.values()]
  index = {id: present.index(name) for id, name in kind_of.items()}
  return np.vectorize(index.__getitem__, otypes=[int])(ids), present


def visible(text: str) -> str:
  """`text` with visible white space."""
  return text.replace(' ', '␣').replace('\n', '⏎').replace('\t', '⇥') if text else '(special)'
