"""Config files: loading one, and setting its keys.

    config = load('configs/mixtral_c4.py:8x7b', {'training.steps': 10, 'model.moe.dispatch.implementation': 'xla'})
    config = load('moejax://mixtral_c4:8x7b')   the same file, wherever python started and moejax is installed

Which keys exist is decided by the constructors (`moejax.config`), which refuse unknown ones.
"""
import ast
import contextlib
import copy
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from moejax.annotations import shown
from moejax.config import ConfigError, nearest
from moejax.shorten import shortened

_PACKAGE = Path(__file__).resolve().parent
# Holds configs/ and experiments/paper_effects/summary.json: a checkout, or what a wheel has of one.
ROOT = _PACKAGE / 'shipped' if (_PACKAGE / 'shipped').is_dir() else _PACKAGE.parent
SCHEME = 'moejax://'
_WORDS = {'true': True, 'false': False}
_STEP = r'[^.\[\]]+|\[\d+\]'
_PATH = r'[^.\[\]]+(\[\d+\])*(\.[^.\[\]]+(\[\d+\])*)*'


def load(argument: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The config of `<file>[:<argument of its get_config>]` with `overrides`; `moejax://<name>` is a shipped file.

  While it is loaded, the folder above the file's is importable: configs import one another, wherever python started.

  Raises:
    ConfigError: there is no such file or variant, or the file raises an exception; then the message begins with the
      traceback from the file on.
  """
  shipped = argument.startswith(SCHEME)
  name, colon, variant = argument.removeprefix(SCHEME).partition(':')
  path = _shipped(name) if shipped else Path(name)
  if not path.is_file():
    raise ConfigError(f'There is no such config file: {name}.' + _near(path))
  name = SCHEME + name if shipped else name
  siblings = _shipped_configs() if shipped else _importable(path.resolve().parent.parent)
  with siblings, _failing_by_itself(path, argument):
    module = _module(path)
    if not callable(getattr(module, 'get_config', None)):
      raise ConfigError(f'{name} is not a config file: it has no function get_config.')
    config = module.get_config(*_arguments(module, name, variant if colon else None))
  if not isinstance(config, (ConfigDict, Mapping)):
    raise ConfigError(f'get_config() of {name} must return a ConfigDict, not {config!r} ({type(config).__name__}).')
  return override(config, overrides or {})


def override(config: Mapping | ConfigDict, overrides: Mapping[str, Any], where: str = 'config') -> ConfigDict:
  """A copy of `config` with the values at these paths, e.g. {'model.moe.dispatch.name': 'gather'}, in their order.

  Missing or None groups on a path are created. A dict replaces its group. `where`: path of `config`. Fewer
  `training.steps` also shorten warm-up and cool-down, see `shorten.shortened`.

  Raises:
    ConfigError: a path through a value without keys, or a dict that would silently remove keys of its group.
  """
  mutable = isinstance(config, ConfigDict) and not isinstance(config, FrozenConfigDict)
  initial: Any = config
  changed: Any = copy.deepcopy(initial) if mutable else ConfigDict(initial)
  for path, value in {**overrides, **shortened(changed, overrides)}.items():
    if not re.fullmatch(_PATH, path):
      raise ConfigError(f'{where}.{path} is not a config path: names with dots between, as in data.augment[0].name.')
    steps = [int(step[1:-1]) if step[0] == '[' else step for step in re.findall(_STEP, path)]
    changed = _changed(changed, steps, value, where)
  return changed


def parse_value(text: str) -> Any:
  """What `text` means on the command line: a Python literal, `true`, `false`, or otherwise the str itself."""
  try:
    return _WORDS[text] if text in _WORDS else ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


# ---- loading --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
  if folder in [Path(entry).resolve() for entry in sys.path]:
    yield
    return
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))


def _shipped(name: str) -> Path:
  """The file of a shipped config."""
  files = {path.stem: path for path in sorted(ROOT.glob('configs/[!_]*.py'))}
  if name not in files:
    raise ConfigError(f'There is no shipped config {name!r}. {nearest(name, files)}')
  return files[name]


@contextlib.contextmanager
def _shipped_configs() -> Iterator[None]:
  """Within it the package `configs` is the shipped one, whatever else has that name."""
  named = lambda: [name for name in sys.modules if name.partition('.')[0] == 'configs']
  before = {name: sys.modules.pop(name) for name in named()}
  package = sys.modules['configs'] = ModuleType('configs')
  package.__path__ = [str(ROOT / 'configs')]
  try:
    yield
  finally:
    for name in named():
      del sys.modules[name]
    sys.modules.update(before)


@contextlib.contextmanager
def _failing_by_itself(path: Path, argument: str) -> Iterator[None]:
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    inside = error.__traceback__
    while inside and Path(inside.tb_frame.f_code.co_filename) != path.resolve():
      inside = inside.tb_next
    lines = ''.join(traceback.format_exception(type(error), error, inside, chain=False)).rstrip()
    raise ConfigError(f'{lines}\nThe config file {argument} raised the exception above.') from error


def _module(path: Path) -> ModuleType:
  spec = importlib.util.spec_from_file_location(f'{path.stem}_config', path.resolve())
  if spec is None or spec.loader is None:
    raise ConfigError(f'{path} is not a config file: its name must end in .py.')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _arguments(module: ModuleType, name: str, variant: str | None) -> list[str]:
  parameters = inspect.signature(module.get_config).parameters.values()
  needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
  variants = getattr(module, 'VARIANTS', ())
  listing = ', '.join(f'{name}:{one}' for one in variants)
  if variant is None and needed:
    raise ConfigError(f'{name} takes an argument: --config={name}:<{needed[0].name}>.' +
                      (f' There are {listing}.' if listing else ''))
  if variant is not None and not parameters:
    raise ConfigError(f'{name} takes no argument, but {variant!r} follows its colon: write --config={name}.')
  if variant is not None and variants and variant not in variants:
    raise ConfigError(f'There is no {name}:{variant}. There are {listing}.')
  return [] if variant is None else [variant]


def _near(path: Path) -> str:
  siblings = [sibling.name for sibling in path.parent.glob('*.py')] if path.parent.is_dir() else []
  close = difflib.get_close_matches(path.name, siblings, n=1)
  return f' Did you mean {path.with_name(close[0])}?' if close else ''


# ---- setting keys ---------------------------------------------------------------------------------------------------


def _changed(node: Any, steps: list[str | int], value: Any, where: str) -> Any:
  """`node`, which is at the config path `where`, with `value` at the end of `steps`."""
  if not steps:
    return _in_place_of(node, value, where)
  step, *rest = steps
  if isinstance(step, int):
    if not isinstance(node, (list, tuple)) or step >= len(node):
      raise ConfigError(f'{where}[{step}] does not exist: {where} is {shown(node)}.')
    items = list(node)
    items[step] = _changed(items[step], rest, value, f'{where}[{step}]')
    return type(node)(items)
  if not isinstance(node, (ConfigDict, Mapping, type(None))):
    raise ConfigError(f'{where}.{step}: {where} is {shown(node)} and has no keys.')
  group = node if isinstance(node, ConfigDict) else dict(node or {})
  old = group.get(step)
  new = _changed(old, rest, value, f'{where}.{step}')
  if isinstance(group, dict):
    group[step] = new
  elif new is not old or step not in group:
    with group.unlocked(), group.ignore_type():  # its constructor checks the type
      group[step] = _group(new, f'{where}.{step}') if isinstance(new, dict) else new
  return group


def _group(values: dict, where: str) -> ConfigDict:
  try:
    return ConfigDict(values)
  except (ValueError, TypeError, AttributeError) as error:
    raise ConfigError(f'{where}: {shown(values)} cannot be a group of a config: {str(error).rstrip(".")}.') from None


def _in_place_of(old: Any, new: Any, where: str) -> Any:
  if isinstance(new, Mapping) and isinstance(old, (ConfigDict, Mapping)) and new and 'name' not in new:
    if removed := [key for key in old if key not in new]:
      key, value = next(iter(new.items()))
      raise ConfigError(f'{where}: the dict would replace the group, and remove {", ".join(removed)}. Set '
                        f'single keys, e.g. --{where}.{key}={value}, or give all keys of the group, or a `name`.')
  # As the config file would have written it, so that a run resumes with an equal config.
  if isinstance(old, float) and type(new) is int:
    return float(new)
  return tuple(new) if isinstance(old, tuple) and isinstance(new, list) else new
