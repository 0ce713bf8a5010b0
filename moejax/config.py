"""Strict configs: everything is built by name, and every key is consumed by exactly one constructor.

Each package declares the names its configs may use:

    SCORES = Registry('score', Score, context=('dim', 'num_experts', 'rngs'))

    @SCORES('linear')
    class Linear(Score):
        def __init__(self, *, dim: int, num_experts: int, rngs: nnx.Rngs, init_std: float = 0.02): ...

and builds one from `dict(name='linear', init_std=0.01)`. Arguments supplied by the surrounding code (`dim`,
`num_experts`, `rngs`) are *context*: passed by parameter name, never written in a config. All other parameters are
config keys; their annotations give their types and ranges (`moejax.ranges`). An unknown or missing key, or a value of
the wrong type or out of range, raises a `ConfigError` with the config path.

Constructors do not know their path. A path, or the message of a `ConfigError`, that begins with a dot, a colon, a
bracket or a space continues the path of the group that is being built:

    self.score = SCORES.build(score, '.score', dim=dim, ...)             # config.model.moe.router.score
    raise ConfigError(f'.k: a token cannot choose {k} of {num_experts} experts.')
    raise ConfigError(': needs vectors, but the features are ids.')

All others are complete: `config.data`, 'The mesh has ...'. What can also fail later, when the model is traced, keeps
`config_path()` when it is built, and calls its parts within `at(that path)`.
"""
import contextlib
import contextvars
import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from moejax.annotations import can_be_in_a_config, matches, shown, spell, within
from moejax.ranges import LARGEST


class Explained(Exception):
  """An error the user can act on. A command prints its message without a traceback and exits.

  Attributes:
    code: exit code of the command.
    at_once: the process must exit without joining its threads, which would wait forever.
  """
  code = 2
  at_once = False


class ConfigError(Explained, ValueError):
  """An invalid config. The message names the key, what is wrong, and what is allowed.

  A message that begins with a dot, a colon, a bracket or a space continues the path of the group being built.
  """


_path: contextvars.ContextVar[str] = contextvars.ContextVar('path', default='')


def config_path() -> str:
  """The config path of the group being built; '' outside of any."""
  return _path.get()


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
  """Within this context `where` is the path, and is put before messages of `ConfigError` that continue it.

  Args:
    where: a path; one that begins with a dot or a bracket continues the present one.
  """
  where = _continued(where)
  token = _path.set(where)
  try:
    yield
  except ConfigError as error:
    error.args = (_continued(str(error)),)
    raise
  finally:
    _path.reset(token)


def _continued(text: str) -> str:
  return config_path() + text if text[:1] in ('', '.', ':', '[', ' ') else text


Built = typing.TypeVar('Built')
Constructor = typing.TypeVar('Constructor', bound=Callable)


class Registry(typing.Generic[Built]):
  """Maps config names to constructors of one kind of object. `Registry.all` lists every registry imported so far."""
  all: ClassVar[list['Registry']] = []

  def __init__(self, what: str, base: type[Built] | Any, context: Iterable[str] = ()):
    """
    Args:
      what: the kind, for errors.
      base: what is built: the base class of registered classes, the annotated result of registered functions.
      context: names of the arguments that the surrounding code may supply; constructors' other parameters are keys.
    """
    self.what, self.base, self.context = what, base, frozenset(context)
    self._constructors: dict[str, Callable[..., Built]] = {}
    self.all.append(self)

  def __call__(self, name: str) -> Callable[[Constructor], Constructor]:
    """Decorator that registers a class or function as `name`.

    Raises:
      TypeError: it does not build a `base`, or a parameter is neither context nor a value that a config can hold.
      ValueError: there is another one of this name.
    """
    def register(constructor):
      if name in self._constructors and not _same_place(self._constructors[name], constructor):
        raise ValueError(f'{self.what} {name!r} exists already: {self._constructors[name].__module__}')
      self._check(constructor)
      self._constructors[name] = constructor
      return constructor
    return register

  def _check(self, constructor):
    label = f'{constructor.__module__}.{constructor.__qualname__}'
    if not _builds(constructor, self.base):
      raise TypeError(f'{label} cannot be a {self.what}: it must be a subclass of {_name(self.base)}, or a function '
                      f'annotated to return one.')
    for name, parameter in _parameters(constructor)[0].items():
      if name not in self.context and not can_be_in_a_config(parameter.annotation):
        raise TypeError(f'{label}: a config cannot hold its parameter {name} ({_name(parameter.annotation)}), and it '
                        f'is not context of a {self.what} ({", ".join(sorted(self.context)) or "which has none"}).')

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._constructors))

  def __getitem__(self, name: str) -> Callable[..., Built]:
    return self._constructors[name]

  def constructor(self, config: Mapping, where: str) -> Callable[..., Built]:
    """The constructor called `config['name']`. Raises `ConfigError` if the name is missing or unknown."""
    where = _continued(where)
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

  def build(self, config: Mapping, where: str, *, beside: Iterable[str] = (), **context) -> Built:
    """Calls the constructor that `config` names with the other keys of `config` as arguments.

    Args:
      config: a `name` and the constructor's keys.
      where: the config path, e.g. '.score', which continues that of the group being built.
      beside: keys of the same group that other code reads, for errors.
      context: arguments supplied by the surrounding code; the registry declares them.
    """
    if undeclared := context.keys() - self.context:
      raise TypeError(f'{", ".join(sorted(undeclared))}: not context of a {self.what}.')
    constructor = self.constructor(config, where)
    return _call(constructor, {k: v for k, v in config.items() if k != 'name'}, where, context, self, config['name'],
                 beside)


def call(constructor: Callable[..., Built], config: Mapping, where: str, **context) -> Built:
  """Calls `constructor` with every key of `config`, and with each item of `context` that it has a parameter for.

  A group without a `name` inherits the name and the other keys of the parameter's default. A parameter
  `**keys: Keys`, of a dataclass `Keys`, takes the keys of a part that the constructor builds: `call(Keys, keys, '')`.

  Args:
    constructor: a class or function.
    config: its keys.
    where: the config path, e.g. '.score', which continues that of the group being built.
    context: arguments supplied by the surrounding code.

  Raises:
    ConfigError: a key of `config` is not a parameter (the message suggests the nearest), a required key is missing, a
      value has the wrong type or is out of range, or only the surrounding code may set the key.
  """
  return _call(constructor, config, where, context)


@dataclasses.dataclass(frozen=True)
class Consumed:
  """A group of keys and the constructor that read it.

  Attributes:
    where: config path.
    constructor: its parameters are the keys.
    keys: its parameters, by name.
    given: the values set explicitly.
    registry, name: where the constructor was looked up, and under which name; None if it was called directly.
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
  """Within this context, every group of keys that is read is appended to the list."""
  token = _record.set(found := [])
  try:
    yield found
  finally:
    _record.reset(token)


def _call(constructor, config, where, context, registry=None, name=None, beside=()):
  where = _continued(where)
  parameters, passed_on = _parameters(constructor)
  allowed = [name for name in parameters if name not in context]
  arguments: dict[str, Any] = {name: context[name] for name in parameters if name in context}
  further = {key: value for key, value in config.items() if key in passed_on and key not in parameters}
  config = {key: _completed(value, parameters[key].default if key in allowed else None)
            for key, value in config.items() if key not in further}
  for key, value in config.items():
    if key not in allowed:
      raise ConfigError(f'{where}.{key}: {_name(constructor)} has no such key. '
                        f'{nearest(key, {*allowed, *passed_on, *beside})}')
    annotation = parameters[key].annotation
    if not matches(value, annotation):
      raise ConfigError(f'{where}.{key} must be {spell(annotation)}, not {shown(value)} ({type(value).__name__}).')
    _check_bounds(value, f'{where}.{key}')
    arguments[key] = value
  missing = [name for name in allowed if name not in arguments and parameters[name].default is inspect.Parameter.empty]
  if missing:
    raise ConfigError(f'{where}.{missing[0]} is missing: {_name(constructor)} needs it '
                      f'({spell(parameters[missing[0]].annotation)}).')
  known = {name: parameter.default for name, parameter in parameters.items()} | arguments
  for key in allowed:
    # A default may be out of range too: it may not divide the value another key was set to.
    value, annotation = known[key], parameters[key].annotation
    if matches(value, annotation) and not within(value, annotation, known):
      default = '' if key in config else ' (the default)'
      raise ConfigError(f'{where}.{key} must be {spell(annotation)}, not {shown(value)}{default}.')
  if (found := _record.get()) is not None:
    found.append(Consumed(where, constructor, {key: parameters[key] for key in allowed}, config, registry, name))
  with at(where):
    return constructor(**arguments, **further)


def _completed(value, default):
  nameless = isinstance(value, (Mapping, ConfigDict)) and 'name' not in value
  return {**default, **value} if nameless and isinstance(default, Mapping) and 'name' in default else value


def _check_bounds(value, where) -> None:
  """Raises ConfigError unless every float inside `value` is finite and every int fits in 32 bits."""
  if isinstance(value, (Mapping, ConfigDict)):
    for key, item in value.items():
      _check_bounds(item, f'{where}.{key}')
  elif isinstance(value, (list, tuple)):
    for number, item in enumerate(value):
      _check_bounds(item, f'{where}[{number}]')
  elif isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f'{where} must be finite, not {value}.')
  elif isinstance(value, int) and not -LARGEST <= value <= LARGEST:
    raise ConfigError(f'{where} must be an int that fits in 32 bits, at most {LARGEST}; not {value}.')


def _same_place(a, b):
  # Rerunning a notebook cell or importlib.reload defines the same thing again, which is not a clash.
  return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _parameters(constructor) -> tuple[dict[str, inspect.Parameter], set[str]]:
  # Its parameters, and the keys that it takes as `**keys: Keys` for a part that it builds in the same group.
  # Read from the class's own __init__: nnx.Module's metaclass hides it from inspect.signature.
  function = constructor.__init__ if inspect.isclass(constructor) else constructor
  hints = typing.get_type_hints(function, include_extras=True)
  parameters, passed_on = {}, set()
  for name, parameter in inspect.signature(function).parameters.items():
    annotation = hints.get(name, Any)
    if parameter.kind is parameter.VAR_KEYWORD and dataclasses.is_dataclass(annotation):
      passed_on = {field.name for field in dataclasses.fields(annotation)}
    elif name != 'self' and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      parameters[name] = parameter.replace(annotation=annotation)
  return parameters, passed_on


def _builds(constructor, base):
  if inspect.isclass(constructor):
    return issubclass(constructor, base)
  result = typing.get_type_hints(constructor).get('return', Any)
  return result == base or base is object or (inspect.isclass(result) and issubclass(result, base))


def _name(named: Any) -> str:
  return getattr(named, '__name__', str(named))


def nearest(word: object, allowed: Iterable[str]) -> str:
  """'Did you mean ..?' if a name is close, followed by the allowed names."""
  allowed = sorted(allowed)
  close = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.5)
  listing = ', '.join(allowed) or 'none'
  return (f'Did you mean {close[0]!r}? ' if close else '') + f'Allowed: {listing}.'
