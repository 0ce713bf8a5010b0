"""Ranges of config keys, declared in their annotations.

    def __init__(self, *, heads: Count, dropout: Rate = 0., kv_heads: Annotated[Count, Divides('heads')] | None = None)

`config.call` checks every annotation before it calls a constructor, and `python -m moejax.describe` prints them. Two
bounds apply to all keys implicitly: floats are finite, and ints fit in 32 bits.
"""
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

LARGEST = 2**31 - 1


@runtime_checkable
class Range(Protocol):
  """A range of values of the annotated type. `str(range)` follows the type: 'a float' + ' above 0'."""

  def admits(self, value: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether `value` is in the range; `arguments` are all arguments of its constructor."""
    ...


@dataclasses.dataclass(frozen=True)
class AtLeast:
  """Lower bound, included."""
  least: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value >= self.least

  def __str__(self):
    return f'of at least {self.least}'


@dataclasses.dataclass(frozen=True)
class Above:
  """Lower bound, excluded."""
  bound: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value > self.bound

  def __str__(self):
    return f'above {self.bound}'


@dataclasses.dataclass(frozen=True)
class AtMost:
  """Upper bound, included."""
  most: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value <= self.most

  def __str__(self):
    return f'of at most {self.most}'


@dataclasses.dataclass(frozen=True)
class Below:
  """Upper bound, excluded."""
  bound: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value < self.bound

  def __str__(self):
    return f'below {self.bound}'


@dataclasses.dataclass(frozen=True)
class Between:
  """Both ends included."""
  least: float
  most: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return self.least <= value <= self.most

  def __str__(self):
    return f'from {self.least} to {self.most}'


@dataclasses.dataclass(frozen=True)
class Divides:
  """The value divides the argument called `of`, a key or context of the same constructor; None accepts any value."""
  of: str

  def admits(self, value: int, arguments: Mapping[str, Any]) -> bool:
    whole = arguments.get(self.of)
    return whole is None or (value != 0 and whole % value == 0)

  def __str__(self):
    return f'that divides {self.of}'


@dataclasses.dataclass(frozen=True)
class NotBelow:
  """The value is at least the argument called `of` of the same constructor."""
  of: str

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value >= arguments[self.of]

  def __str__(self):
    return f'of at least {self.of}'


@dataclasses.dataclass(frozen=True)
class NotEmpty:
  """For lists, tuples, dicts and strings."""

  def admits(self, value: Any, arguments: Mapping[str, Any]) -> bool:
    return len(value) > 0

  def __str__(self):
    return 'that is not empty'


Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, Between(0, 1)]
# A probability of dropping something: 1 would drop everything.
Rate = Annotated[float, AtLeast(0), Below(1)]
