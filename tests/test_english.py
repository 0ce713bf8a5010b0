"""The prose of strings, docstrings and comments: idioms that a native reader stumbles over do not come back.

Each pattern has a better word: resume or continue, "is not a", an int, the field's own noun.
"""
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Folders and files that are checked; notebooks and Markdown are checked as a whole.
ROOMS = ('README.md', 'CONTRIBUTING.md', 'configs', 'docs', 'examples', 'experiments', 'moejax')
IDIOMS = {
    'resume, continue': r'\bgo(es)? on\b',
    'is not a': r'(?<!there )\b(is|are) no\b(?! longer| more)',
    'name the things': r'\bthose that\b',
    'an int': r'\bwhole numbers?\b',
    'say who says it': r'\b(is|are) (said|told|asked)\b',
    'is routed to, uses, is multiplied with': r'\bmeets?\b',
    'sees, needs, depends on': r'\blooks? at\b',
    'per': r'\b(bytes|choices|examples|experts|rows|slots|tokens) a (byte|chip|device|expert|group|slot|step|token)\b',
    'instead of, replaces': r'\bin the place of\b',
    'shard, assign, extract, remove': r'\b(give|given|share|shared|take|takes|taken) out\b',
    'padding': r'\bnobody\b',
    'the inverse, transposed': r'\bthe other way round\b',
    'bit-identical': r'\bto the last bit\b',
}


def files():
  for room in map(ROOT.joinpath, ROOMS):
    yield from ([room] if room.is_file() else
                sorted(path for path in room.rglob('*') if path.suffix in ('.py', '.md', '.ipynb')))


def prose(path):
  """(line, text) of every string and comment; of every line if it is not Python."""
  text = path.read_text()
  if path.suffix != '.py':
    return list(enumerate(text.splitlines(), 1))
  kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, 'FSTRING_MIDDLE', None)}
  return [(token.start[0], re.sub(r'\s+', ' ', token.string))
          for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type in kinds]


PROSE = [(path.relative_to(ROOT), line, text) for path in files() for line, text in prose(path)]


def test_every_room_exists():
  assert all((ROOT / room).exists() for room in ROOMS)


@pytest.mark.parametrize('better', IDIOMS)
def test_no_text_has_the_idiom(better):
  pattern = re.compile(IDIOMS[better], re.IGNORECASE)
  assert not [f'{path}:{line}: {found[0]!r} (better: {better})'
              for path, line, text in PROSE for found in pattern.finditer(text)]


@pytest.mark.parametrize('text', ['It goes on.', 'This is no loss.', 'those that fit', 'a whole number', 'is said',
                                  'a token meets', '2 experts a token', 'are taken out', 'looks at'])
def test_a_text_with_an_idiom_is_found(text):
  assert any(re.search(pattern, text, re.IGNORECASE) for pattern in IDIOMS.values())


@pytest.mark.parametrize('text', ['There is no such key.', 'it is no longer used', 'those of the paper',
                                  'two experts per token'])
def test_plain_english_is_not(text):
  assert not any(re.search(pattern, text, re.IGNORECASE) for pattern in IDIOMS.values())
