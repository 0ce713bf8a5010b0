"""Masks of parameters: which of them decay, and which have a path that matches an expression."""
import re

from moejax.config import ConfigError
from moejax.functional import Functional, Tree, flatten, unflatten

# Parameters that no axis name identifies, by a part of their path: learned positions, and tokens that are not words.
_NEVER_DECAYED = re.compile(r'(^|/)(\w*bias|\w*scale|\w*position\w*|\w*encoding|class_token|registers?)(/|$)')


def decay_mask(model: Functional, decay: str | None, where: str) -> Tree:
  """A bool for every parameter of `model`. Raises ConfigError if `decay` is invalid or matches nothing."""
  axes, shapes = flatten(model.axes), flatten(model.shapes()[0])
  if decay is None:
    return unflatten({path: decayed_by_default(path, axes[path], shapes[path].shape) for path in shapes})
  return matching(model, decay, where)


def matching(model: Functional, expression: str, where: str) -> Tree:
  """Whether the regular `expression` matches in the path of each parameter. Raises ConfigError if it matches none."""
  paths = flatten(model.shapes()[0])
  try:
    pattern = re.compile(expression)
  except re.error as error:
    raise ConfigError(f'{where}: {expression!r} is not a regular expression ({error}).') from None
  mask = {path: bool(pattern.search(path)) for path in paths}
  if not any(mask.values()):
    raise ConfigError(f'{where}: {expression!r} matches no parameter path; the paths are '
                      f'{", ".join(sorted(paths)[:8])}, ...')
  return unflatten(mask)


def decayed_by_default(path: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> bool:
  """Whether this is a kernel or a word embedding, and not a bias, a norm's scale or a learned position.

  The number of dimensions alone does not decide: a stack of layers or experts makes a matrix of each bias, and
  attention biases have two dimensions, heads and their width. So these axes are not counted.
  """
  named = list(zip(axes, shape))
  if named and named[0][0] == 'layers':
    named = named[1:]
  if named and named[0][0] == 'expert':
    named = named[1:]
  named = [(name, size) for name, size in named if name != 'head_dim' and (name or size > 1)]
  return len(named) >= 2 and not any(name == 'length' for name, _ in named) and not _NEVER_DECAYED.search(path)
