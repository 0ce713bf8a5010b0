"""Which keys a config may have: all that the constructors accept which it reaches, also those that it leaves out."""
import dataclasses
import functools
import importlib
import inspect
import pathlib
from collections.abc import Callable

from moejax import config as config_lib
from moejax.training import setup

_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


_COMMON = frozenset({'where', 'rngs', 'dim', 'num_experts'})


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
class Probe:
  """What a config is made of; paths are without the leading `config.`.

  Attributes:
    config: as `load` gives it.
    keys: parameters of the constructors that read them, by path: 'model.attention.heads'.
    registries: of each path that is built by name, and the parameters that are found in the context there.
  """
  config: dict
  keys: dict[str, inspect.Parameter]
  registries: dict[str, tuple[config_lib.Registry, frozenset[str]]]


@functools.cache
def probe(name: str) -> Probe:
  """Prepares the config once, and notes who reads what."""
  config, keys, registries = load(name), {}, {}
  with config_lib.recorded() as groups:
    setup.prepare(config)
  for group in groups:
    where = group.where.removeprefix('config').removeprefix('.')
    keys |= {f'{where}.{key}'.removeprefix('.'): parameter for key, parameter in group.keys.items()}
    if group.registry is not None:
      registries[where] = group.registry, _COMMON | (set(parameters(group.constructor)) - set(group.keys))
  return Probe(config, keys, registries)


def parameters(constructor: Callable) -> dict[str, inspect.Parameter]:
  """Of a class or a function, with their annotations."""
  return config_lib._parameters(constructor)[0]
