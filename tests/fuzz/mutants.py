"""Configs with one to three mistakes in them.

A change is a line of text, so that a mutant can be read, kept in a file, and made again:

    model.dim = -1                    sets a key (any Python literal, nan and inf)
    del model.dim                     leaves it out
    model.moe.router <- t5_chitchat   takes a section from another config
    model.encoder <-> model.decoder   swaps two
"""
import copy
import dataclasses
import inspect
import math
import random
import types
import typing
from collections.abc import Mapping
from typing import Any

from moejax import ranges
from tests.fuzz import probe as probes

KINDS = ('type', 'zero', 'negative', 'not finite', 'huge', 'tiny', 'boundary', 'scaled', 'choice', 'name', 'missing',
         'unknown', 'nested', 'section', 'none')


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A config and what is changed in it, and of what kinds the changes are."""
  config: str
  changes: tuple[str, ...]
  kinds: tuple[str, ...] = ()

  def build(self, load=probes.load) -> dict:
    """The changed config, as plain dicts."""
    config = copy.deepcopy(load(self.config))
    for change in self.changes:
      apply(config, change, load)
    return config


def apply(config: dict, change: str, load=probes.load) -> None:
  """Makes one change in place. A group that it lies in is made where there is none."""
  if change.startswith('del '):
    parent, key = _parent(config, change[4:])
    parent.pop(key, None)
  elif ' <-> ' in change:
    (first, a), (second, b) = (_parent(config, path) for path in change.split(' <-> '))
    first[a], second[b] = second.get(b), first.get(a)
  elif ' <- ' in change:
    path, other = change.split(' <- ')
    other, _, source = other.partition(' ')
    parent, key = _parent(config, path)
    parent[key] = copy.deepcopy(_get(load(other), source or path))
  else:
    path, value = change.split(' = ', 1)
    parent, key = _parent(config, path)
    parent[key] = literal(value)


def literal(text: str) -> Any:
  """A Python literal in which nan and inf may stand."""
  return eval(text, {'__builtins__': {}, 'nan': math.nan, 'inf': math.inf})


def _parent(config, path):
  *groups, key = path.split('.')
  for group in groups:
    if not isinstance(config.get(group), dict):
      config[group] = {}
    config = config[group]
  return config, key


def draw(number: int, seed: int, names: list[str] | None = None) -> Mutant:
  """The mutant of that number, of the configs `names` or of all that ship; the same for the same seed."""
  rng = random.Random(f'{seed}/{number}')
  names = names or probes.names()
  name = names[number % len(names)]
  probed = probes.probe(name)
  count = rng.choice((1, 1, 1, 1, 1, 2, 3))
  drawn = [_change(rng, probed) for _ in range(count)]
  return Mutant(name, tuple(change for change, _ in drawn), tuple(kind for _, kind in drawn))


def _change(rng: random.Random, probed: probes.Probe) -> tuple[str, str]:
  path = rng.choice(sorted(probed.keys))
  key = probed.keys[path]
  draw = rng.random()
  if draw < 0.04:
    present = [path for path in probed.keys if _get(probed.config, path) is not _ABSENT]
    return f'del {rng.choice(sorted(present))}', 'missing'
  if draw < 0.08:
    parent = path.rpartition('.')[0]
    key = rng.choice(('foo', path.split('.')[-1] + 's', 'name', 'where', 'rngs', 'dim'))
    return f'{parent}.{key} = 1'.lstrip('.'), 'unknown'
  if draw < 0.26:
    return _other_name(rng, probed)
  if draw < 0.34:
    return _section(rng)
  return _value(rng, path, key, _get(probed.config, path))


_ABSENT = object()


def _get(config, path):
  for part in path.split('.'):
    if not isinstance(config, Mapping) or part not in config:
      return _ABSENT
    config = config[part]
  return config


def _other_name(rng, probed):
  # Another part by its name, with the keys that it has to have, or with those of the one before.
  path = rng.choice(sorted(probed.registries))
  registry, context = probed.registries[path]
  name = rng.choice(list(registry))
  if rng.random() < 0.1:
    wrong = rng.choice((repr(name + 's'), "''", 'None', '3', '[]', '{}', 'nan', 'True'))
    return f'{path}.name = {wrong}', 'name'
  if rng.random() < 0.1:
    return f'{path}.name = {name!r}', 'name'
  given = {'name': name}
  for key, parameter in probes.parameters(registry[name]).items():
    if key in context:
      continue
    if parameter.default is inspect.Parameter.empty or rng.random() < 0.15:
      given[key] = _plausible(rng, parameter.annotation)
  return f'{path} = {given!r}', 'name'


_SECTIONS = (
    'model', 'model.attention', 'model.feed_forward', 'model.norm', 'model.positions', 'model.sparse', 'model.encoder',
    'model.decoder', 'model.moe', 'model.moe.dispatch', 'model.moe.experts', 'model.moe.router',
    *(f'model.moe.router.{stage}' for stage in ('features', 'score', 'select', 'weigh', 'place', 'balance')),
    'objective', 'method', 'data', 'data.source', 'data.tokenizer', 'optimizer', 'optimizer.schedule',
    'evaluation.evaluators', 'mesh')


def _section(rng):
  # A section of another config, in the same place or in one that it does not belong to.
  path = rng.choice(_SECTIONS)
  if rng.random() < 0.15:
    return f'{path} <-> {rng.choice(_SECTIONS)}', 'section'
  others = rng.sample(probes.names(), len(probes.names()))
  return f'{path} <- {next(name for name in others if _get(probes.load(name), path) is not _ABSENT)}', 'section'


_WRONG = ("'text'", "''", "'1'", 'None', 'True', '3', '0.5', '1.5', '1e3', '[]', '()', '{}', '[1, 2]', '[[1], [2]]',
          "['a']", "(1, 'a')", "{'name': 'x'}", "{'name': []}", "{'a': {'b': [1]}}")


def _value(rng, path, key, current) -> tuple[str, str]:
  numbers = _numeric(key.annotation)
  if numbers and rng.random() < 0.75:
    kind = rng.choice(('zero', 'negative', 'not finite', 'huge', 'tiny', 'boundary', 'scaled', 'scaled', 'boundary'))
    whole = float not in numbers
    start = next((value for value in (current, key.default) if isinstance(value, (int, float))), 1)
    value = {
        'zero': lambda: rng.choice((0, 0.0) if not whole else (0,)),
        'negative': lambda: rng.choice((-1, -2, -7, -2**31) if whole else (-1., -1e-9, -5., -1e30)),
        'not finite': lambda: rng.choice((math.nan, math.inf, -math.inf)),
        'huge': lambda: rng.choice((10**4, 10**6, 2**31 - 1, 2**31, 2**40, 2**63, 10**30) if whole else
                                   (1e6, 1e30, 3.5e38, 1e300, 10**400, 2**31)),
        'tiny': lambda: rng.choice((1, 2, 3)) if whole else rng.choice((1e-30, 1e-46, 1e-300, 5e-324, 1e-9)),
        'boundary': lambda: _boundary(rng, key.annotation, whole),
        'scaled': lambda: _scaled(rng, start, whole)}[kind]()
    return f'{path} = {value!r}', kind
  choices = _choices(key.annotation)
  if choices and rng.random() < 0.7:
    return f'{path} = {rng.choice(choices)!r}', 'choice'
  draw = rng.random()
  if draw < 0.15:
    return f'{path} = None', 'none'
  if draw < 0.3 and current is not _ABSENT:
    return f'{path} = {rng.choice((repr([current]), repr({"a": current}), repr([[current]])))}', 'nested'
  if draw < 0.5:
    return f'{path} = {_plausible(rng, key.annotation)!r}', 'scaled'
  return f'{path} = {rng.choice(_WRONG)}', 'type'


def _boundary(rng, annotation, whole):
  ends = [getattr(part, field) for part in _ranges(annotation) for field in ('least', 'most', 'bound')
          if hasattr(part, field)]
  end = rng.choice(ends or [1])
  step = 1 if whole else 1e-6
  value = end + rng.choice((-step, 0, 0, step))
  return int(value) if whole else value


def _scaled(rng, start, whole):
  value = rng.choice((start + 1, start - 1, start * 2, start * 3, start / 2, start * 10, start * 100, 1 - start,
                      start / 10))
  return int(value) if whole else value


def _plausible(rng, annotation) -> Any:
  # A value of the type, within its range where that is simple.
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    for _ in range(20):
      value = _plausible(rng, parts[0])
      if all(part.admits(value, {}) for part in parts[1:] if isinstance(part, ranges.Range) and not hasattr(part, 'of')):
        return value
    return value
  if origin in (typing.Union, types.UnionType):
    return _plausible(rng, rng.choice(parts))
  if origin is typing.Literal:
    return rng.choice(parts)
  if annotation in (None, type(None)):
    return None
  kind = origin or annotation
  if kind is bool:
    return rng.random() < 0.5
  if kind is int:
    return rng.choice((1, 1, 2, 2, 3, 4, 8, 16))
  if kind is float:
    return rng.choice((0.5, 1., 0.1, 2., 0.))
  if kind is str:
    return rng.choice(('train', 'test', 'x', 'token_ids'))
  if kind in (tuple, list):
    return [_plausible(rng, parts[0] if parts else int) for _ in range(rng.choice((1, 2, 3)))]
  if kind is dict or inspect.isclass(kind) and issubclass(kind, Mapping):
    return rng.choice(({}, {'name': 'none'}, {'name': 'linear'}, {'name': 'token'}, {'name': 'normal', 'std': 0.1}))
  return rng.choice((1, 'x', 0.5))


def _leaves(annotation):
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return _leaves(parts[0])
  if origin in (typing.Union, types.UnionType):
    return [leaf for part in parts for leaf in _leaves(part)]
  return [annotation]


def _numeric(annotation):
  return [leaf for leaf in _leaves(annotation) if leaf in (int, float)]


def _choices(annotation):
  found = []
  for leaf in _leaves(annotation):
    if typing.get_origin(leaf) is typing.Literal:
      found += typing.get_args(leaf)
    if leaf is bool:
      found += [True, False]
  return found


def _ranges(annotation):
  if typing.get_origin(annotation) is typing.Annotated:
    return [part for part in typing.get_args(annotation)[1:] if isinstance(part, ranges.Range)]
  return [part for leaf in typing.get_args(annotation) for part in _ranges(leaf)]
