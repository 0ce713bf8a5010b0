"""Memory traffic of a compiled program: the bytes its instructions read from and write to a device's memory.

A fusion reads its operands once and writes its results once; operands that it slices count by slice. TPU programs mark
arrays that stay on the chip (memory space `S(n)`), which do not count. Loops count as often as they run.
"""
import re

from moejax.planning import hlo

# Instructions without traffic, or whose traffic is counted elsewhere.
_FREE = frozenset('parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota while '
                  'conditional call opt-barrier optimization-barrier'.split())
_SLICES = frozenset('dynamic-slice slice gather'.split())


def traffic(compiled_text: str) -> float:
  """Bytes read and written in one run, by one device."""
  module = hlo.parse(compiled_text)
  return _computation(module, module.entry, None)


def _computation(module: hlo.Module, computation: hlo.Computation, around: hlo.Loop | None) -> float:
  total = 0.
  for instruction in computation.instructions.values():
    match instruction.opcode:
      case 'while':
        loop = hlo.Loop(instruction, computation, around)
        trips = hlo.trip_count(module, loop)
        body = module.computations[instruction.attribute('body')]
        total += (1 if trips is None else trips) * _computation(module, body, loop)
      case 'conditional':
        total += max(_computation(module, module.computations[name], around) for name in instruction.called)
      case 'call':
        total += sum(_computation(module, module.computations[name], around) for name in instruction.called)
      case opcode if opcode not in _FREE and not opcode.endswith(('-done', '-update')):
        total += _instruction(module, computation, instruction)
  return total


def _instruction(module, computation, instruction) -> float:
  shapes = [computation.instructions[name].shape for name in instruction.operands
            if name in computation.instructions]
  if instruction.opcode == 'fusion':
    return _fusion(module.computations[instruction.called[0]], instruction, shapes)
  if instruction.opcode in _SLICES:
    return 2 * in_memory(instruction.shape)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * in_memory(shapes[1])
  # The start of a copy or a collective repeats its operands in its result.
  written = 0 if instruction.opcode.endswith('-start') and instruction.shape.startswith('(') else 1
  return sum(map(in_memory, shapes)) + (in_memory(instruction.shape) if written else _landed(instruction.shape, shapes))


def _landed(shape, operands) -> float:
  return max(0, in_memory(shape) - sum(map(in_memory, operands)))


def _fusion(inside, instruction, shapes) -> float:
  parameters = {int(i.operands[0]): i for i in inside.instructions.values() if i.opcode == 'parameter'}
  read, written = 0., in_memory(instruction.shape)
  for number, shape in enumerate(shapes):
    users = [user for user in inside.instructions.values() if parameters[number].name in user.operands]
    if not in_memory(shape):
      continue
    if users and all(user.opcode in _SLICES and user.operands[0] == parameters[number].name for user in users):
      read += sum(hlo.size(user.shape) for user in users)
    elif users and all(_updated_in_place(user, parameters[number].name) for user in users):
      # Only the updated slice is read and written.
      update = sum(hlo.size(inside.instructions[user.operands[1]].shape) for user in users)
      read, written = read + update, written - in_memory(shape) + update
    else:
      read += in_memory(shape)
  return read + max(written, 0)


def _updated_in_place(user, name) -> bool:
  return user.opcode == 'dynamic-update-slice' and user.operands[0] == name


def in_memory(shape: str) -> int:
  """Bytes of the arrays of a shape that are in the device's main memory."""
  return hlo.size(re.sub(r'\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}', '', shape))
