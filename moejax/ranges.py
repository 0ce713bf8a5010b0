"""Which values a config key may have, said in its annotation.

    def __init__(self, *, heads: Count, dropout: Rate = 0., kv_heads: Annotated[Count, Divides('heads')] | None = None)

`config.call` checks every annotation before it calls a constructor, and `python -m moejax.describe` prints them. Two
bounds hold without being said, for all keys: a number is finite, and a whole number fits in 32 bits.
"""
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

LARGEST = 2**31 - 1


@runtime_checkable
class Range(Protocol):
  """What an annotation says about values of its type. `str(range)` follows the type: 'a number' + ' above 0'."""

  def admits(self, value: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether `value` lies inside; `arguments` are all that its constructor receives."""
    ...


@dataclasses.dataclass(frozen=True)
class AtLeast:
  """The least value belongs to the range."""
  least: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value >= self.least

  def __str__(self):
    return f'of at least {self.least}'


@dataclasses.dataclass(frozen=True)
class Above:
  """The bound does not belong to the range."""
  bound: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value > self.bound

  def __str__(self):
    return f'above {self.bound}'


@dataclasses.dataclass(frozen=True)
class AtMost:
  """The most belongs to the range."""
  most: float

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value <= self.most

  def __str__(self):
    return f'of at most {self.most}'


@dataclasses.dataclass(frozen=True)
class Below:
  """The bound does not belong to the range."""
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
  """The value divides the argument called `of`, a key or context of the same constructor.

  Any value does where that is None.
  """
  of: str

  def admits(self, value: int, arguments: Mapping[str, Any]) -> bool:
    whole = arguments.get(self.of)
    return whole is None or (value != 0 and whole % value == 0)

  def __str__(self):
    return f'that divides {self.of}'


@dataclasses.dataclass(frozen=True)
class NotBelow:
  """The value is not below the argument called `of` of the same constructor."""
  of: str

  def admits(self, value: float, arguments: Mapping[str, Any]) -> bool:
    return value >= arguments[self.of]

  def __str__(self):
    return f'that is not below {self.of}'


@dataclasses.dataclass(frozen=True)
class NotEmpty:
  """Of lists, tuples, dicts and strings."""

  def admits(self, value: Any, arguments: Mapping[str, Any]) -> bool:
    return len(value) > 0

  def __str__(self):
    return 'that is not empty'


Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, Between(0, 1)]
# A probability of leaving something out: at 1 nothing would be left.
Rate = Annotated[float, AtLeast(0), Below(1)]
