"""Mixture-of-experts research in JAX: any router, any dispatch, any model, from one config.

The names in `__init__.pyi` are imported on first use, so that `import moejax` takes milliseconds and commands answer before
jax is imported.
"""
import ast
import importlib
from pathlib import Path

__version__ = '0.1.0'
_STUB = ast.parse(Path(__file__).with_suffix('.pyi').read_text(encoding='utf-8'))
SOURCES = {alias.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}
__all__ = sorted(SOURCES)


def __getattr__(name: str):
  if name not in SOURCES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  source = importlib.import_module(SOURCES[name])
  submodule = source.__name__ == __name__ or not hasattr(source, name)
  value = importlib.import_module(f'{source.__name__}.{name}') if submodule else getattr(source, name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return [*__all__, '__version__']
