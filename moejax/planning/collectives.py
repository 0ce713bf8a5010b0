"""The collectives of a compiled program: which, how large, among how many devices, and how often they run.

    found = collectives(compiled.as_text())
    count(found)   # {'all-to-all': (6, 3145728), 'all-reduce': (3, 12)}
"""
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from moejax.planning import hlo

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
         'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    bytes: of the full array on one device, summed over the arrays of a combined operation: the input (and output) of an
      all-reduce, all-to-all or permute, the output of an all-gather, the input of a reduce-scatter. For a ragged
      all-to-all, whose arrays are sized for the worst case, the smaller of both sides: the volume if devices send
      equally.
    group: devices that exchange with each other, by their position in the mesh; the first group of several.
    times: number of executions per run of the program: the product of the trip counts of the enclosing loops. All
      branches of a conditional count.
    where: the JAX operation it comes from, as named in the program, or ''.
    exact: whether the trip counts of all enclosing loops are known; unknown ones count as 1 in `times`.
  """
  kind: str
  bytes: int
  group: tuple[int, ...]
  times: int = 1
  where: str = ''
  exact: bool = True

  @property
  def group_size(self) -> int:
    """Number of devices that exchange with each other."""
    return len(self.group)

  @property
  def sent(self) -> float:
    """Bytes that one device sends per execution, with the algorithms that send the least (rings, direct).

    Source: Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH (2005).
    """
    others = (self.group_size - 1) / self.group_size
    match self.kind:
      case 'all-reduce':
        return 2 * others * self.bytes
      case 'collective-permute' | 'collective-broadcast':
        return self.bytes
    return others * self.bytes


def collectives(compiled_text: str) -> list[Collective]:
  """Every collective of an optimised program (`compiled.as_text()` for CPU, TPU or GPU), in program order.

  Asynchronous pairs count once. Collectives of a single device move nothing and are omitted.
  """
  module = hlo.parse(compiled_text)
  return [found for found in _walk(module, module.entry, None, 1, True) if found.group_size > 1]


def count(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
  """{kind: (runs, bytes of all runs)}."""
  summary: dict[str, tuple[int, int]] = {}
  for collective in found:
    runs, total = summary.get(collective.kind, (0, 0))
    summary[collective.kind] = runs + collective.times, total + collective.times * collective.bytes
  return summary


def _walk(module: hlo.Module, computation: hlo.Computation, around: hlo.Loop | None, times: int,
          exact: bool) -> Iterator[Collective]:
  for instruction in computation.instructions.values():
    kind = instruction.opcode.removesuffix('-start')
    if kind in KINDS:
      if not _continues_another(computation, instruction):
        yield _collective(module, computation, instruction, kind, times, exact)
    elif instruction.opcode == 'while':
      loop = hlo.Loop(instruction, computation, around)
      trips = hlo.trip_count(module, loop)
      body = module.computations[instruction.attribute('body')]
      yield from _walk(module, body, loop, times * (1 if trips is None else trips), exact and trips is not None)
    elif instruction.opcode not in ('async-update', 'async-done'):  # they name the computation of async-start again
      for name in instruction.called:
        yield from _walk(module, module.computations[name], around, times, exact)


def _continues_another(computation: hlo.Computation, instruction: hlo.Instruction) -> bool:
  # On TPU, matmuls overlap with a collective by being fused with parts of it: a chain of fusions from its start to its
  # end, each with a copy of the instruction.
  if 'chain_id=' not in instruction.attributes:
    return False
  return not any(other.opcode == 'custom-call' and '"AsyncCollectiveStart"' in other.attributes
                 for other in computation.instructions.values())


def _collective(module, computation, instruction, kind, times, exact) -> Collective:
  operands = [hlo.size(computation.instructions[name].shape) for name in instruction.operands]
  group = _group(instruction.attributes, module.devices)
  match kind:
    case 'ragged-all-to-all':
      total = min(operands[:2])  # The others are sizes and offsets.
    case 'collective-permute':
      total = operands[0]  # The others are positions.
    case 'all-gather':
      total = sum(operands) * len(group)
    case _:
      total = sum(operands)
  return Collective(kind, total, group, times, instruction.op_name, exact)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
  """The first group of devices, in any of the four notations."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return _chain({int(a): int(b) for a, b in re.findall(r'(\d+),(\d+)', pairs[1])})
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return tuple(map(int, listed[1].split(',')))
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    order = _integers(iota[3]) if iota[3] else None
    return tuple(_grid(_integers(iota[2])).transpose(order).ravel()[:int(iota[1])].tolist())
  if mesh := re.search(r'replica_groups=\w+\[([^\]]*)\]\s*\{([^}]*)\}', attributes):
    return _mesh_group(re.findall(r"'(\w+)'=(\d+)", mesh[1]), re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2]))
  return tuple(range(devices))


def _mesh_group(axes: list[tuple[str, str]], along: list[tuple[str, str, str]]) -> tuple[int, ...]:
  """The first group along axes of a mesh, or along parts of axes: ('x', '2', '4') is 4 of x after a part of size 2."""
  sizes = {name: int(size) for name, size in axes}
  devices = _grid(list(sizes.values()))
  taken = [slice(0, 1)] * len(sizes)
  for name, before, part in along:
    step = sizes[name] // (int(before) * int(part)) if part else 1
    taken[list(sizes).index(name)] = slice(0, step * int(part or sizes[name]), step)
  return tuple(devices[tuple(taken)].ravel().tolist())


def _chain(targets: dict[int, int]) -> tuple[int, ...]:
  """The devices that data passes through, from the first one on."""
  first = next((device for device in targets if device not in targets.values()), next(iter(targets)))
  chain = [first]
  while (following := targets.get(chain[-1], first)) != first:
    chain.append(following)
  return tuple(chain)


def _grid(sizes: list[int]) -> np.ndarray:
  return np.arange(math.prod(sizes)).reshape(sizes)


def _integers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]
