"""Annotations of config keys: whether a value has their type and range (`moejax.ranges`), and both in words."""
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moejax.ranges import Range


def can_be_in_a_config(annotation) -> bool:
  """Whether a config can hold values of the annotated type."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return can_be_in_a_config(arguments[0])
  if origin in (typing.Union, types.UnionType, tuple, list, dict, Sequence, Mapping):
    return all(argument is Ellipsis or can_be_in_a_config(argument) for argument in arguments)
  return (origin is typing.Literal or
          annotation in (str, bool, int, float, None, type(None), Any, tuple, list, dict, Sequence, Mapping))


def matches(value, annotation) -> bool:
  """Whether `value` has the annotated type; ranges are ignored."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return matches(value, arguments[0])
  if annotation is Any or annotation is inspect.Parameter.empty:
    return True
  if origin is typing.Literal:
    return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
  if origin in (typing.Union, types.UnionType):
    return any(matches(value, argument) for argument in arguments)
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
    return all(matches(item, items) for item in value)
  if kind in (dict, Mapping) or (inspect.isclass(kind) and issubclass(kind, Mapping)):
    return isinstance(value, (Mapping, ConfigDict))
  return isinstance(value, kind) if inspect.isclass(kind) else True


def within(value, annotation, arguments) -> bool:
  """Whether `value`, of the annotated type, lies in its range. `arguments`: all arguments of the constructor."""
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return (within(value, parts[0], arguments) and
            all(part.admits(value, arguments) for part in parts[1:] if isinstance(part, Range)))
  if origin in (typing.Union, types.UnionType):
    return any(within(value, part, arguments) for part in parts if matches(value, part))
  if origin in (tuple, list, Sequence) and parts:
    return all(within(item, parts[0], arguments) for item in value)
  return True


def spell(annotation) -> str:
  """The values an annotation allows, in words."""
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
  names = {float: 'a float', int: 'an int', str: 'a string', bool: 'True or False', tuple: 'a tuple',
           list: 'a list', Sequence: 'a list', Any: 'any value', inspect.Parameter.empty: 'any value'}
  if kind in (tuple, list, Sequence) and arguments:
    return f'{names[kind]} whose items are each {spell(arguments[0])}'
  return names.get(kind, getattr(kind, '__name__', str(kind)))


def shown(value: object) -> str:
  """A config value for an error message, on one line: the repr of a ConfigDict spans several."""
  return repr(value.to_dict() if isinstance(value, ConfigDict) else value)
