"""Checks the shapes and dtypes in annotations at every call, while tests run: `Float[Array, 'G S E']`.

Only annotations of arrays count. Those of config keys are checked where configs are read, by rules of their own (an int
is a float, a ConfigDict a mapping). Fields of dataclasses are not checked: as trees they hold shapes, placements or
gradients as well, and stacks of arrays where layers are scanned.
"""
import contextlib
import functools
import operator
import types
import typing
from collections.abc import Callable, Iterator

import beartype
import jaxtyping
import numpy as np

# The packages whose public functions have such annotations.
PACKAGES = ('moejax.routing', 'moejax.dispatch', 'moejax.experts', 'moejax.kernels', 'moejax.layers')


def install() -> None:
  """Checks all of `PACKAGES` that are imported from here on."""
  jaxtyping.install_import_hook(list(PACKAGES), f'{__name__}.check_arrays')


def check_arrays(function: Callable) -> Callable:
  """`function` with its annotations of arrays, and no others, checked at every call."""
  hints = {name: or_numpy(hint) for name, hint in function.__annotations__.items() if has_shape(hint)}
  if function.__name__ == '__init__' or not hints:
    return function
  function.__annotations__ = hints
  return beartype.beartype(function)


def has_shape(hint: object) -> bool:
  """Whether an annotation, or a part of it, gives the shape of an array."""
  return is_shape(hint) or any(map(has_shape, typing.get_args(hint)))


def is_shape(hint: object) -> bool:
  return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def or_numpy(hint: typing.Any) -> typing.Any:
  """The annotation, or the same of an array of NumPy, which jax takes everywhere."""
  if is_shape(hint):
    return hint | hint.dtype[np.ndarray, hint.dim_str]
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return functools.reduce(operator.or_, map(or_numpy, typing.get_args(hint)))
  return hint


@contextlib.contextmanager
def off() -> Iterator[None]:
  """Checks nothing: for what a function itself says of wrong shapes."""
  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    yield
  finally:
    jaxtyping.config.update('jaxtyping_disable', False)
