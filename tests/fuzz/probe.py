"""Which keys a config may have: all that the constructors accept which it reaches, also those that it leaves out."""
import contextlib
import dataclasses
import functools
import importlib
import pathlib
import sys
from typing import Any

from moejax import config as config_lib
from moejax.training import setup

_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@functools.cache
def names() -> list[str]:
  """Every config that ships, with its variants: 'vmoe_digits', 'switch_c4:base'."""
  found = []
  for path in sorted(_CONFIGS.glob('[!_]*.py')):
    variants = getattr(importlib.import_module(f'configs.{path.stem}'), 'VARIANTS', (None,))
    found += [path.stem if variant is None else f'{path.stem}:{variant}' for variant in variants]
  return found


@functools.cache
def load(name: str) -> dict:
  """A config as plain nested dicts, which are not to be changed."""
  file, _, variant = name.partition(':')
  get_config = importlib.import_module(f'configs.{file}').get_config
  return (get_config(variant) if variant else get_config()).copy_and_resolve_references().to_dict()


@dataclasses.dataclass(frozen=True)
class Key:
  """A key that something reads.

  Attributes:
    annotation: of its values.
    default: `inspect.Parameter.empty` where it has to be given.
  """
  annotation: Any
  default: Any


@dataclasses.dataclass(frozen=True)
class Probe:
  """What a config is made of.

  Attributes:
    config: as `load` gives it.
    keys: by path without the leading `config.`, `model.attention.heads`.
    registries: of each path that is built by name, and the context that its constructors receive.
  """
  config: dict
  keys: dict[str, Key]
  registries: dict[str, tuple[config_lib.Registry, frozenset[str]]]


@contextlib.contextmanager
def _everywhere(original, replacement):
  modules = [module for module in sys.modules.values() if vars(module).get('call') is original]
  for module in modules:
    module.call = replacement
  try:
    yield
  finally:
    for module in modules:
      module.call = original


@functools.cache
def probe(name: str) -> Probe:
  """Builds and traces the config once, and notes who reads what."""
  config = load(name)
  keys, registries = {}, {}
  original_call, original_build = config_lib.call, config_lib.Registry.build

  def call(constructor, config, where, **context):
    for key, parameter in config_lib._parameters(constructor).items():
      if key not in context and key != 'where':
        keys[f'{where}.{key}'.removeprefix('config.')] = Key(parameter.annotation, parameter.default)
    return original_call(constructor, config, where, **context)

  def build(self, config, where, **context):
    registries[where.removeprefix('config.')] = self, frozenset(context)
    constructor = self.constructor(config, where)
    return call(constructor, {k: v for k, v in config.items() if k != 'name'}, where, **context)

  with _everywhere(original_call, call):
    config_lib.Registry.build = build
    try:
      setup.prepare(config)
    finally:
      config_lib.Registry.build = original_build
  return Probe(config, keys, registries)
