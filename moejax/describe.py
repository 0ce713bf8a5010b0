"""Lists every key of a config: its value, default, type, range and meaning.

    python -m moejax.describe configs/vmoe_digits.py
    python -m moejax.describe configs/mixtral_c4.py:8x7b model.moe --format=md
    python -m moejax.describe configs/vmoe_digits.py model.moe.dispatch --config.model.moe.dispatch.name=grouped

Keys are found by building the config as a run does, so the list is exactly the keys that are read. Where a `name`
selects an implementation, the alternatives are listed below it; the keys shown belong to the config's choice, and
--config.<group>.name=<another> shows the keys of another. Without a config, all registered names are listed. From
Python: `moejax.describe.keys(config)`. Exit codes are as for moejax.train.
"""
import dataclasses
import inspect
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moejax import command_line, config_files
from moejax.annotations import spell
from moejax.config import ConfigError, Consumed, Registry, nearest, recorded

NEEDED = inspect.Parameter.empty
_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of a config, or a group of them.

  Attributes:
    path: e.g. 'model.moe.num_experts'.
    type: its allowed values, in words.
    line: its meaning, from the docstring.
    value: its value in this config; None for a group.
    default: its value if the config omits it; `NEEDED` if it is required.
    group: whether it has keys of its own, which follow it.
    names: {name: description} of every implementation that can be chosen here.
  """
  path: str
  type: str
  line: str
  value: Any = None
  default: Any = NEEDED
  group: bool = False
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def keys(config: Mapping | ConfigDict, devices: Sequence[Any] | None = None) -> list[Key]:
  """All keys read when `config` is built for `devices`, each group before its members.

  Raises:
    ConfigError: the config cannot be built.
  """
  from moejax.training import setup
  with recorded() as found:
    built = setup.build(config, devices)
  return list(_Listing(found, built.config).below('config', {}))


def within(keys: Iterable[Key], path: str) -> list[Key]:
  """The keys at `path` and below it. Raises ConfigError if there are none."""
  keys, path = list(keys), path.removeprefix('config.')
  found = [key for key in keys if key.path == path or key.path.startswith((f'{path}.', f'{path}['))]
  if not found:
    above = max((key.path for key in keys if path.startswith(f'{key.path}.')), key=len, default='')
    beside = [key.path for key in keys if re.fullmatch(re.escape(f'{above}.' if above else '') + r'[^.]+', key.path)]
    raise ConfigError(f'The config has no key {path}. {nearest(path, beside)}')
  return found


class _Listing:
  """The consumed keys, in the order of the config's tree."""

  def __init__(self, found: Iterable[Consumed], config: ConfigDict):
    self._config = config
    self._groups: dict[str, dict[Callable, Consumed]] = {}
    read: dict[str, set[str]] = {}
    for consumed in found:
      read.setdefault(consumed.where, set()).update(consumed.keys)
    for consumed in found:  # identical layers read the same group
      self._groups.setdefault(_written(consumed.where, read), {}).setdefault(consumed.constructor, consumed)

  def below(self, where: str, default: Mapping) -> Iterator[Key]:
    """The keys of the group at `where`; `default`: the group's value if the config omits it."""
    listed = set()  # attention and cross-attention read the same keys
    for consumed in self._groups[where].values():
      registry = consumed.registry
      if registry is not None and self._chooses(where, consumed, default):
        yield Key(_short(f'{where}.name'), f'which {registry.what}, by name', sentence(consumed.constructor),
                  consumed.name, default.get('name', NEEDED), names=names(registry))
      for name, parameter in consumed.keys.items():
        if name not in listed:
          listed.add(name)
          yield from self._key(f'{where}.{name}', consumed, default.get(name, parameter.default))

  def _key(self, where, consumed, default):
    name = where.rpartition('.')[2]
    key = Key(_short(where), spell(consumed.keys[name].annotation), docstring_entry(consumed.constructor, name),
              default=_plain(default))
    members = [one for one in self._groups if re.fullmatch(re.escape(where) + r'(\.[^.\[]+|\[\d+\])', one)]
    if where in self._groups:
      yield dataclasses.replace(key, group=True)
      yield from self.below(where, default if isinstance(default, Mapping) else {})
    elif members:
      first = next(iter(self._groups[members[0]].values()))
      by_key = first.registry if not self._chooses(members[0], first, {}) else None
      yield dataclasses.replace(key, group=True, names={} if by_key is None else names(by_key))
      for member in members:
        yield from self._member(member)
    else:
      yield dataclasses.replace(key, value=_plain(self._value(where, consumed.given.get(name, default))))

  def _member(self, where):
    # A member of a list, or of a group whose keys the user chooses, such as evaluators.
    consumed = next(iter(self._groups[where].values()))
    value = self._value(where, None)
    if isinstance(value, (Mapping, ConfigDict)):
      yield Key(_short(where), 'a dict', sentence(consumed.constructor), group=True)
      yield from self.below(where, {})
    else:
      yield Key(_short(where), f'a float, or a dict of {", ".join(consumed.keys)}', sentence(consumed.constructor),
                value)

  def _chooses(self, where, consumed, default):
    """Whether the group has a key `name`; in `router.balance` the keys of the group above are the names."""
    value = self._value(where, default)
    groups = [group for group in (value, default) if isinstance(group, (Mapping, ConfigDict))]
    return consumed.registry is not None and any('name' in group for group in groups)

  def _value(self, where, default):
    node: Any = self._config
    for step in re.findall(r'[^.\[\]]+|\[\d+\]', _short(where)):
      index = int(step[1:-1]) if step[0] == '[' else step
      if not isinstance(index, int) and index not in node:
        return default
      node = node[index]
    return node


def _written(where: str, read: Mapping[str, set[str]]) -> str:
  # A value passed on to a nested group, as a model passes its `norm` to an encoder, is a key of the outer group only.
  parent, _, name = where.rpartition('.')
  above = parent
  while parent in read and above and name not in read.get(above, ()):
    above = above.rpartition('.')[0]
  return f'{above}.{name}' if above and f'{above}.{name}' not in read else where


def _short(where: str) -> str:
  return where.removeprefix('config.')


def _plain(value: Any) -> Any:
  return value.to_dict() if isinstance(value, ConfigDict) else value


# ---- docstrings -----------------------------------------------------------------------------------------------------


def docstring_entry(constructor: Callable, key: str) -> str:
  """The entry for `key` in the docstring of a function, a class or its base classes; '' if there is none.

  Entries are `key: text`, or `one, key: text`, on a line of their own; continuation lines are indented further.
  """
  for docstring in _docstrings(constructor):
    entry = re.search(rf'^( *)(?:\w+, )*{key}(?:, \w+)*: (.*(?:\n\1 +\S.*)*)', docstring, re.MULTILINE)
    if entry:
      return re.sub(r'\s+', ' ', entry[2])
  return ''


def sentence(constructor: Callable) -> str:
  """The first sentence of its docstring, or of the function's that it refers to: 'See `switch_loss`.'."""
  text = re.sub(r'\s+', ' ', next(_docstrings(constructor), '').strip().split('\n\n')[0])
  elsewhere = re.match(r'See (?:the function )?`(\w+)`', text)
  if elsewhere and (function := getattr(sys.modules[constructor.__module__], elsewhere[1], None)):
    return sentence(function)
  found = re.match(r'(.*?\.|.*)(?= [A-Z`]|$)', text)
  return found[1] if found else text


def names(registry: Registry) -> dict[str, str]:
  """{name: description} for every name in a registry."""
  return {name: sentence(registry[name]) for name in registry}


def _docstrings(constructor):
  bases = constructor.__mro__[:-1] if inspect.isclass(constructor) else [constructor]
  for base in bases:
    functions = [base, vars(base).get('__init__')] if inspect.isclass(base) else [base]
    texts = [part.__doc__ for part in functions if part is not None and part.__doc__]
    # A dataclass without a docstring gets its signature as one.
    yield from (inspect.cleandoc(text) for text in texts if not text.startswith(f'{base.__name__}('))


# ---- writing --------------------------------------------------------------------------------------------------------


def as_text(keys: Sequence[Key]) -> str:
  """A tree, indented by level."""
  lines = []
  for key in keys:
    indent = '  ' * _depth(key)
    lines.append(f'{indent}{_last(key)}{_state(key, "{}")}')
    lines += textwrap.wrap(_meaning(key), _WIDTH, initial_indent=f'{indent}      ', subsequent_indent=f'{indent}      ')
    width = max(map(len, key.names), default=0)
    for name, what in key.names.items():
      lines += textwrap.wrap(f'{name:<{width}}  {what}', _WIDTH, initial_indent=f'{indent}        ',
                             subsequent_indent=f'{indent}        {"":<{width}}  ')
  return '\n'.join(lines)


def as_markdown(keys: Sequence[Key]) -> str:
  """Nested lists."""
  top = min(map(_depth, keys), default=0)
  lines = []
  for key in keys:
    indent = '  ' * (_depth(key) - top)
    lines.append(f'{indent}- **{_last(key)}**{_state(key, "`{}`")}: {_meaning(key)}')
    lines += [f'{indent}  - `{name}`: {what}' for name, what in key.names.items()]
  return '\n'.join(lines)


def _depth(key):
  return len(re.findall(r'[.\[]', key.path))


def _last(key):
  return re.split(r'\.|(?=\[)', key.path)[-1]


def _state(key, code):
  if key.group:
    return ''
  value = f' = {code.format(repr(key.value))}'
  if key.default is NEEDED:
    return f'{value} (needed)'
  return value if key.value == key.default else f'{value} (default {code.format(repr(key.default))})'


def _meaning(key):
  return f'{key.type[0].upper()}{key.type[1:]}. {key.line[:1].upper()}{key.line[1:]}'.rstrip()


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
  """The command."""
  flags = command_line.Parser('moejax.describe', __doc__, keys='config', usage='[config[:argument] [path]] [flags]')
  flags.add_argument('config', nargs='?',
                     help='config file, e.g. configs/vmoe_digits.py, or a shipped one, e.g. moejax://vmoe_digits')
  flags.add_argument('path', nargs='?', help='group to list, e.g. model.moe; all by default')
  flags.add_argument('--format', choices=('text', 'md'), default='text', help='%(default)s by default')
  given = flags.parse()
  write = as_text if given.format == 'text' else as_markdown
  if given.config is None:
    print(write(_all_names()))
    return
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  config = config_files.load(given.config, given.overrides)
  found = keys(config, _devices(config))
  print(write(found if given.path in (None, 'config') else within(found, given.path)))


def _all_names() -> list[Key]:
  from moejax.training import setup  # noqa: F401  (whose imports register everything)
  return [Key(registry.what, 'all names', '', group=True, names=names(registry))
          for registry in sorted(Registry.all, key=lambda registry: registry.what)]


def _devices(config: ConfigDict) -> Sequence[Any]:
  # As many simulated devices as the config's mesh needs, so that a pod's config can be described on a laptop.
  import jax
  mesh = config.get('mesh')
  sizes = [size for size in mesh.values() if type(size) is int and size > 0] if isinstance(mesh, ConfigDict) else []
  jax.config.update('jax_num_cpu_devices', math.prod(sizes))
  return jax.devices()


script = lambda: command_line.in_one_sentence(main)

if __name__ == '__main__':
  script()
