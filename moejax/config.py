"""Strict configs: everything is built by name, and every key is consumed by exactly one constructor.

A room of the house declares what can be named in it:

    SCORES = Registry('score')

    @SCORES('linear')
    class Linear(nnx.Module):
        def __init__(self, *, dim, num_experts, rngs, init_std: float = 0.02): ...

and builds it from `dict(name='linear', init_std=0.01)`. What the surrounding code supplies (`dim`, `num_experts`,
`rngs`) is *context*: taken by parameter name, never written in a config. All other parameters are config keys; their
annotations are their types and ranges (`moejax.ranges`). A key that is unknown, missing, of another type or out of its
range is a `ConfigError` that says where.
"""
import contextlib
import contextvars
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ml_collections import ConfigDict

from moejax import ranges


class Explained(Exception):
  """What a person can act on. A command prints the message, without a traceback, and ends.

  Attributes:
    code: exit code of the command.
    at_once: the process must not wait for its threads, which wait for what will not come.
  """
  code = 2
  at_once = False


class ConfigError(Explained, ValueError):
  """A config that cannot be built. The message names the key, what is wrong, and what is allowed."""


class Registry:
  """The names that one room of the house understands. `Registry.all`: every one that was imported."""
  all: ClassVar[list['Registry']] = []

  def __init__(self, what: str):
    self.what = what
    self._constructors: dict[str, Callable] = {}
    self.all.append(self)

  def __call__(self, name: str) -> Callable:
    """Decorator: makes a class or function buildable as `name`."""
    def register(constructor):
      if name in self._constructors and not _same_place(self._constructors[name], constructor):
        raise ValueError(f'{self.what} {name!r} exists already: {self._constructors[name].__module__}')
      self._constructors[name] = constructor
      return constructor
    return register

  def __iter__(self):
    return iter(sorted(self._constructors))

  def __getitem__(self, name: str) -> Callable:
    return self._constructors[name]

  def constructor(self, config: Mapping, where: str) -> Callable:
    """What `config['name']` names. Raises `ConfigError` where the name is missing or unknown."""
    if not isinstance(config, (Mapping, ConfigDict)):
      raise ConfigError(f'{where} must be a dict with a `name` ({", ".join(self)}), not {config!r}.')
    if 'name' not in config:
      raise ConfigError(f'{where}.name is missing: which {self.what}? One of {", ".join(self)}.')
    if not isinstance(config['name'], str):
      raise ConfigError(f'{where}.name must be the name of a {self.what}, not {shown(config["name"])}: '
                        f'one of {", ".join(self)}.')
    if config['name'] not in self._constructors:
      raise ConfigError(f'{where}.name: there is no {self.what} {config["name"]!r}. '
                        f'{nearest(config["name"], self)}')
    return self._constructors[config['name']]

  def build(self, config: Mapping, where: str, *, beside: Iterable[str] = (), **context) -> Any:
    """Builds what `config` names; the rest of `config` are its arguments.

    Args:
      config: a `name`, and keys.
      where: the config path, for errors.
      beside: keys of the same group which are read by others, for errors.
      context: what the surrounding code supplies.
    """
    constructor = self.constructor(config, where)
    return _call(constructor, {k: v for k, v in config.items() if k != 'name'}, where, context, self, config['name'],
                 beside)


def call(constructor: Callable, config: Mapping, where: str, **context) -> Any:
  """Calls `constructor` with every key of `config`, and with those of `context` that it has parameters for.

  A group without a `name` takes that of the parameter's default, and with it the default's other keys.
  A parameter called `where` receives the config path, so that nested parts can be built with paths of their own.

  Raises:
    ConfigError: a key of `config` that is no parameter (the nearest is named), a required one that is missing, a value
      of another type than annotated or out of its range, or a key that only the surrounding code may set.
  """
  return _call(constructor, config, where, context)


@dataclasses.dataclass(frozen=True)
class Consumed:
  """A group of keys and who reads it.

  Attributes:
    where: config path.
    constructor: what its keys are parameters of.
    keys: those parameters, by name.
    given: the values that are not left at their defaults.
    registry, name: of what the constructor was built by, if it was.
  """
  where: str
  constructor: Callable
  keys: dict[str, inspect.Parameter]
  given: dict[str, Any]
  registry: Registry | None = None
  name: str | None = None


_record: contextvars.ContextVar[list[Consumed] | None] = contextvars.ContextVar('record', default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Consumed]]:
  """Within this context whatever reads a config is noted in the list: its keys are all that there are."""
  token = _record.set(found := [])
  try:
    yield found
  finally:
    _record.reset(token)


def _call(constructor, config, where, context, registry=None, name=None, beside=()):
  context = dict(context, where=where)
  parameters = _parameters(constructor)
  allowed = [name for name in parameters if name not in context]
  arguments = {name: context[name] for name in parameters if name in context}
  config = {key: _completed(value, parameters[key].default if key in allowed else None)
            for key, value in config.items()}
  for key, value in config.items():
    if key not in allowed:
      raise ConfigError(f'{where}.{key}: {_label(config, constructor)} has no such key. '
                        f'{nearest(key, [*allowed, *beside])}')
    annotation = parameters[key].annotation
    if not _matches(value, annotation):
      raise ConfigError(f'{where}.{key} must be {spell(annotation)}, not {shown(value)} ({type(value).__name__}).')
    _check_bounds(value, f'{where}.{key}')
    arguments[key] = value
  missing = [name for name in allowed if name not in arguments and parameters[name].default is inspect.Parameter.empty]
  if missing:
    raise ConfigError(f'{where}.{missing[0]} is missing: {_label(config, constructor)} needs it '
                      f'({spell(parameters[missing[0]].annotation)}).')
  known = {name: parameter.default for name, parameter in parameters.items()} | arguments
  for key in allowed:
    # A default, too, may fail to divide what another key was set to.
    value, annotation = known[key], parameters[key].annotation
    if _matches(value, annotation) and not _within(value, annotation, known):
      default = '' if key in config else ' (the default)'
      raise ConfigError(f'{where}.{key} must be {spell(annotation)}, not {shown(value)}{default}.')
  if (found := _record.get()) is not None:
    found.append(Consumed(where, constructor, {key: parameters[key] for key in allowed}, config, registry, name))
  return constructor(**arguments)


def _completed(value, default):
  nameless = isinstance(value, (Mapping, ConfigDict)) and 'name' not in value
  return {**default, **value} if nameless and isinstance(default, Mapping) and 'name' in default else value


def _check_bounds(value, where) -> None:
  """Of every number inside `value`: it is finite, and fits in 32 bits where it is whole."""
  if isinstance(value, (Mapping, ConfigDict)):
    for key, item in value.items():
      _check_bounds(item, f'{where}.{key}')
  elif isinstance(value, (list, tuple)):
    for number, item in enumerate(value):
      _check_bounds(item, f'{where}[{number}]')
  elif isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f'{where} must be finite, not {value}.')
  elif isinstance(value, int) and not -ranges.LARGEST <= value <= ranges.LARGEST:
    raise ConfigError(f'{where} must be a whole number that 32 bits hold, at most {ranges.LARGEST}; not {value}.')


def _same_place(a, b):
  # A notebook cell or an importlib.reload defines the same thing again; that is no clash.
  return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _parameters(constructor) -> dict[str, inspect.Parameter]:
  # The signature of the class's own __init__: nnx.Module's metaclass hides it from inspect.signature.
  function = constructor.__init__ if inspect.isclass(constructor) else constructor
  hints = typing.get_type_hints(function, include_extras=True)
  parameters = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if name == 'self' or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    parameters[name] = parameter.replace(annotation=hints.get(name, Any))
  return parameters


def _label(config, constructor):
  return getattr(constructor, '__name__', repr(constructor))


def nearest(word: object, allowed: Iterable[str]) -> str:
  """'Did you mean ..?', where there is something near, and what is allowed."""
  allowed = sorted(allowed)
  close = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.5)
  listing = ', '.join(allowed) or 'none'
  return (f'Did you mean {close[0]!r}? ' if close else '') + f'Allowed: {listing}.'


def _matches(value, annotation) -> bool:
  """Whether `value` is of the annotated type, whatever its range."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return _matches(value, arguments[0])
  if annotation is Any or annotation is inspect.Parameter.empty:
    return True
  if origin is typing.Literal:
    return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
  if origin in (typing.Union, types.UnionType):
    return any(_matches(value, argument) for argument in arguments)
  if annotation is None or annotation is type(None):
    return value is None
  if annotation is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if annotation is int:
    return isinstance(value, int) and not isinstance(value, bool)
  kind = origin or annotation
  if kind in (tuple, list, Sequence):
    if not isinstance(value, (tuple, list)):
      return False
    items = arguments[0] if arguments else Any
    return all(_matches(item, items) for item in value)
  if kind in (dict, Mapping) or (inspect.isclass(kind) and issubclass(kind, Mapping)):
    return isinstance(value, (Mapping, ConfigDict))
  return isinstance(value, kind) if inspect.isclass(kind) else True


def shown(value: object) -> str:
  """A value of a config in an error; a ConfigDict would spell itself over several lines."""
  return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def _within(value, annotation, arguments) -> bool:
  """Whether `value`, of the annotated type, lies in its range. `arguments`: what the constructor receives besides."""
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return (_within(value, parts[0], arguments) and
            all(part.admits(value, arguments) for part in parts[1:] if isinstance(part, ranges.Range)))
  if origin in (typing.Union, types.UnionType):
    return any(_within(value, part, arguments) for part in parts if _matches(value, part))
  if origin in (tuple, list, Sequence) and parts:
    return all(_within(item, parts[0], arguments) for item in value)
  return True


def spell(annotation) -> str:
  """The values that an annotation allows, in words."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return ' and '.join([f'{spell(arguments[0])} {arguments[1]}', *map(str, arguments[2:])])
  if origin is typing.Literal:
    return 'one of ' + ', '.join(repr(a) for a in arguments)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(spell(a) for a in arguments)
  if annotation is None or annotation is type(None):
    return 'None'
  kind = origin or annotation
  if kind is dict or (inspect.isclass(kind) and issubclass(kind, Mapping)):
    return 'a dict'
  names = {float: 'a number', int: 'a whole number', str: 'a string', bool: 'True or False', tuple: 'a tuple',
           list: 'a list', Sequence: 'a list', Any: 'any value', inspect.Parameter.empty: 'any value'}
  if kind in (tuple, list, Sequence) and arguments:
    return f'{names[kind]} of which each is {spell(arguments[0])}'
  return names.get(kind, getattr(kind, '__name__', str(kind)))
