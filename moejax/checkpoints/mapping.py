"""Rules that say what each array of a model starts from: the array of a source that its path names, by default.

    MappingRule('/moe/experts/', 'repeat', '/feed_forward/')    blocks/1/moe/experts/wi <- blocks/1/feed_forward/wi
    MappingRule('/moe/router/', 'reinitialise')

All is by path, in the unrolled form (`unrolled`), and before any array is read: `assign` only needs shapes. It refuses
what no rule allows: an array of ours without a value, one of another shape, an array of the source that is not used.
"""
import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moejax.checkpoints.operations import OPERATIONS, REINITIALISE, Do, Shape, grids
from moejax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class MappingRule:
  """One of `config.init.rules`.

  Attributes:
    ours: regular expression, searched in the unrolled paths of our parameters and router state.
    do: 'copy'; 'repeat': a copy for each entry of a new leading axis, the experts; 'stack': an entry from each of
      several sources; 'mean': of several sources; 'resize': linear interpolation along the first axis, as of learned
      positions; 'resize_grid': bilinear interpolation of a table whose rows are a square grid of image patches, after a
      class token if there is one; 'reinitialise': ours keeps its random initial value.
    source: replaces what `ours` matches, which gives the path in the source; may refer to groups of `ours` as \\1.
      None: the same path.
  """
  ours: str
  do: Do = 'copy'
  source: str | None = None

  def __post_init__(self):
    try:
      re.sub(self.ours, self.source or '', '')
    except (re.error, IndexError) as error:
      raise ConfigError(f': ours={self.ours!r} is not a regular expression, or source={self.source!r} not a '
                        f'replacement for it ({error}).') from None

  def matches(self, path: str) -> bool:
    """Whether it is a rule for our array at `path`."""
    return re.search(self.ours, path) is not None

  def assign(self, path: str, number: int) -> 'Assigned':
    """What our array at `path` starts from; `number` is that of this rule."""
    return Assigned(self.do, self._in_source(path), number)

  def _in_source(self, path):
    return path if self.source is None else re.sub(self.ours, self.source, path, count=1)


@dataclasses.dataclass(frozen=True)
class Assigned:
  """What an array of ours starts from.

  Attributes:
    do: see `MappingRule`.
    source: path in each source; of what is reinitialised, the path of what is not read.
    rule: number of the rule that says so; None: no rule does.
  """
  do: str
  source: str
  rule: int | None = None

  def value(self, sources: Sequence[Mapping[str, np.ndarray]], shape: Shape) -> np.ndarray:
    """The array itself, unless it is reinitialised."""
    return OPERATIONS[self.do].compute([source[self.source] for source in sources], shape)


def assign(rules: Sequence[MappingRule], unused: Sequence[str], ours: Mapping[str, Shape],
           sources: Sequence[Mapping[str, Shape]], name: str) -> dict[str, Assigned]:
  """{our path: what it starts from}.

  Args:
    rules: the first that matches a path of ours counts; where none does, it is copied from the same path.
    unused: regular expressions, searched in paths of the sources that may stay unused.
    ours: shapes of all our arrays by path.
    sources: shapes of those of each source.
    name: of the sources, for errors.

  Raises:
    ConfigError: names all arrays without a value, with another shape and unused, and rules that would help; or a rule
      or a pattern that matches nothing.
  """
  assigned = {path: next((rule.assign(path, number) for number, rule in enumerate(rules) if rule.matches(path)),
                         Assigned('copy', path)) for path in ours}
  for number in sorted(set(range(len(rules))) - {one.rule for one in assigned.values()}):
    raise ConfigError(f'.rules[{number}]: ours={rules[number].ours!r} matches no array of this model that an earlier '
                      f'rule does not match. {_nearest(rules[number].ours, ours)}')
  known = {path for source in sources for path in source}
  for number, pattern in enumerate(unused):
    if not any(re.search(pattern, path) for path in known):
      raise ConfigError(f'.unused[{number}] = {pattern!r} matches no array of {name}. {_nearest(pattern, known)}')

  read = {path: one for path, one in assigned.items() if one.do != REINITIALISE}
  for path, one in read.items():
    if OPERATIONS[one.do].several != (len(sources) > 1):
      several = "do='mean' or do='stack'" if len(sources) > 1 else f'another `do`, as {one.do!r} is for several'
      raise ConfigError(f'.path names {len(sources)} source{"s"[:len(sources) > 1]}, and {path} would start by '
                        f'{one.do!r}: a rule for it must have {several}. A last rule with ours=\'\' matches all others.')
  missing = [path for path, one in read.items() if not all(one.source in source for source in sources)]
  misfits = [path for path, one in read.items() if path not in missing and not all(
      OPERATIONS[one.do].fits(ours[path], source[one.source], len(sources)) for source in sources)]
  left = sorted(path for path in known - {one.source for one in assigned.values()}
                if not any(re.search(pattern, path) for pattern in unused))
  if missing or misfits or left:
    first = {path: shape for source in reversed(sources) for path, shape in source.items()}
    complaints = [
        ('Without a source', [f'{path} {ours[path]}{_by(path, read[path])}' for path in missing]),
        ('Of another shape', [f'{path} {ours[path]} from {first[read[path].source]}{_by(path, read[path])}'
                              for path in misfits]),
        ('Not used in the source', [f'{path} {first[path]}' for path in left])]
    listed = ' '.join(f'{what}: {_some(paths)}.' for what, paths in complaints if paths)
    raise ConfigError(f': {name} does not fit this model. {listed} '
                      f'What would help: {_help(missing, misfits, left, ours, first, read, len(sources))}.')
  return assigned


def counts(assigned: Iterable[Assigned]) -> str:
  """'24 copied, 8 repeated to experts, 2 reinitialised'."""
  number = Counter(one.do for one in assigned)
  said = {**{do: operation.said for do, operation in OPERATIONS.items()}, REINITIALISE: 'reinitialised'}
  return ', '.join(f'{number[do]} {words}' for do, words in said.items() if number[do])


def _by(path, one):
  """The rule and the path it gives, where these say more than the path of ours."""
  rule = '' if one.rule is None else f'rules[{one.rule}]'
  return f' ({", ".join(filter(None, [rule, one.source * (one.source != path)]))})' if rule else ''


def _some(paths, most=6):
  return ', '.join(paths[:most]) + (f' and {len(paths) - most} more' if len(paths) > most else '')


def _nearest(pattern, paths):
  close = difflib.get_close_matches(pattern, sorted(paths), n=3, cutoff=0)
  return f'There are, for example, {", ".join(close)}.'


def _help(missing, misfits, left, ours, first, read, sources):
  """Rules and `unused` patterns, one for each module that needs one."""
  rules, repeated = [], set()
  for path in missing:
    dense = path.replace('/moe/experts/', '/feed_forward/')
    if dense != path and ours[path][1:] == first.get(dense):
      do = 'repeat' if sources == 1 else 'stack'
      rules.append(f"dict(ours='/moe/experts/', source='/feed_forward/', do='{do}')")
      repeated.add(dense)
    else:
      rules.append(f"dict(ours='{_module(path)}', do='{REINITIALISE}')")
  for path in misfits:
    new, old = ours[path], first[read[path].source]
    positions = re.search('position|encoding', path) and new[1:] == old[1:]
    do = ('resize_grid' if grids(old[0], new[0]) else 'resize') if positions and sources == 1 else REINITIALISE
    rules.append(f"dict(ours='{_module(path)}', do='{do}')")
  spared = [f"'{_module(path)}'" for path in left if path not in repeated]
  unique = [', '.join(dict.fromkeys(parts)) + ',' for parts in (rules, spared)]
  return ', and '.join(f'{key}=({parts})' for key, parts in zip(('rules', 'unused'), unique) if parts != ',')


def _module(path):
  """A pattern for the arrays beside `path`, in all layers."""
  if re.search('(^|/)views/', path):
    return '(^|/)views/'
  inside = re.fullmatch(r'(?:.*/)?blocks/\d+(/.+/|/)[^/]+', path)
  return inside[1] if inside else f'^{path.rpartition("/")[0]}/' if '/' in path else f'^{path}$'
