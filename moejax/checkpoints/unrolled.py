"""Where the parameters of each layer are stored, so that models scanned over their layers and unrolled ones have one form.

    unrolled   blocks/3/attention/query
    scanned    blocks/1/1/attention/query, entry 0: the second segment, the second block of its unit, its first repeat

Rules between models are written for the unrolled form.
"""
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from moejax.layers import stack

_SCANNED = re.compile(r'((?:.*/)?)(blocks|views)/(\d+)/(\d+)/(.+)')  # `views` of weights lie like their blocks


class Stored(NamedTuple):
  """Where an array of the unrolled form is stored.

  Attributes:
    path: of the stored array.
    repeat: its entry along the leading axis; None: all of it.
  """
  path: str
  repeat: int | None = None


def stored(flat: Mapping[str, Any]) -> dict[str, Stored]:
  """{path in the unrolled form: where it is stored}; entries of a stored array come in its order.

  Args:
    flat: arrays, or their shapes, of a whole model by path, scanned or unrolled.
  """
  scanned = {path: match for path in flat if (match := _SCANNED.fullmatch(path))}
  depths = _depths(flat, scanned.values())
  found = {}
  for path, leaf in flat.items():
    if path not in scanned:
      found[path] = Stored(path)
      continue
    prefix, blocks, segment, position, rest = scanned[path].groups()
    for repeat in range(leaf.shape[0]):
      depth = depths[prefix, int(segment), repeat, int(position)]
      found[f'{prefix}{blocks}/{depth}/{rest}'] = Stored(path, repeat)
  return found


def _depths(flat, matches):
  """{(prefix, segment, repeat, position in the unit): depth}."""
  segments: dict[str, dict[int, tuple[int, int]]] = {}
  for match in matches:
    prefix, _, segment, position, _ = match.groups()
    unit, _ = segments.setdefault(prefix, {}).get(int(segment), (0, 0))
    segments[prefix][int(segment)] = max(unit, int(position) + 1), flat[match.string].shape[0]
  return {(prefix, segment, repeat, position): depth for prefix, sizes in segments.items()
          for depth, segment, repeat, position in stack.places(sizes[number] for number in sorted(sizes))}
