"""Total and active parameters of a model."""
import dataclasses
import math

from moejax.functional import Functional, flatten


@dataclasses.dataclass(frozen=True)
class Part:
  """Attributes:
    total: number of parameters.
    active: number of active parameters, used for one token: of experts, only the share that a token is sent to.
  """
  total: int
  active: float


def count(model: Functional, expert_share: float) -> dict[str, Part]:
  """`{part of the model: Part}`: experts, routers, and all others by the first name of their path.

  `expert_share` is the rows of expert computation per token over the number of experts: K/E.
  """
  parts: dict[str, Part] = {}
  for path, leaf in flatten(model.shapes()[0]).items():
    name, size = part_of(path), math.prod(leaf.shape)
    old = parts.get(name, Part(0, 0.))
    parts[name] = Part(old.total + size, old.active + size * (expert_share if name == 'experts' else 1))
  return parts


def part_of(path: str) -> str:
  """The part of the model that a parameter belongs to."""
  names = path.split('/')
  parts = (('experts', 'experts'), ('layers', 'experts'), ('router', 'routers'))  # experts may be whole layers
  return next((part for name, part in parts if name in names), names[0])
