"""Parses compiled programs (optimised HLO text): computations, their instructions, and trip counts of loops.

Only the parts needed for planning are parsed, from `compiled.as_text()` for CPU, TPU and GPU.
Source of the grammar: XLA's own printer (`HloInstruction::ToString`, `ReplicaGroupList::ToString`).
"""
import dataclasses
import functools
import math
import re

# A name before a list of attributes, or the text of a computation's header.
_NAME = r'%?([\w.\-]+)'
_CALLED = re.compile(r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)=' + _NAME)
_CALLED_LISTS = re.compile(r'\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}')
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_BITS = dict(pred=8, token=0, opaque=0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `[ROOT] name = shape opcode(operands), attributes`; operands are names, except for constants."""
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations it runs."""
    plain = _strings_removed(self.attributes)
    lists = [name for names in _CALLED_LISTS.findall(plain) for name in re.findall(_NAME, names)]
    return tuple(dict.fromkeys(_CALLED.findall(plain) + lists))

  def attribute(self, name: str) -> str:
    """The computation, number or word given as `name=`. Raises ValueError if there is none."""
    found = re.search(rf'\b{name}=' + _NAME, _strings_removed(self.attributes))
    if found is None:
      raise ValueError(f'The instruction {self.name} has no attribute {name!r}.')
    return found[1]

  @property
  def op_name(self) -> str:
    """The JAX operation it comes from, or ''."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ''


@dataclasses.dataclass
class Computation:
  """Instructions by name, in order; `root` is its result."""
  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
  root: Instruction | None = None


@dataclasses.dataclass(frozen=True)
class Module:
  """A program, run by `devices` together."""
  computations: dict[str, Computation]
  entry: Computation
  devices: int


@dataclasses.dataclass(frozen=True)
class Loop:
  """A while instruction, the computation it is in, and the innermost enclosing loop."""
  instruction: Instruction
  owner: Computation
  around: 'Loop | None' = None


def parse(text: str) -> Module:
  """Raises ValueError if the text has no entry computation."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if line.startswith('}'):
      current = None
    elif current is None and line.endswith('{') and not line.startswith('HloModule') and (
        header := re.match(r'(ENTRY )?' + _NAME, line)):
      current = computations[header[2]] = Computation(header[2])
      if header[1]:
        entry = current
    elif current is not None and ' = ' in line:
      instruction = _instruction(line.strip())
      current.instructions[instruction.name] = instruction
      if line.lstrip().startswith('ROOT '):
        current.root = instruction
  if entry is None:
    raise ValueError('This is not optimised HLO: it has no ENTRY computation.')
  counts = [int(n) for n in re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', text.split('\n', 1)[0])]
  return Module(computations, entry, math.prod(counts))


def size(shape: str) -> int:
  """Bytes of an array, or of all arrays of a tuple, without the padding of layouts."""
  total = 0
  for kind, dimensions in _ARRAY.findall(re.sub(r'\{[^}]*\}', '', shape)):
    bits = _BITS[kind] if kind in _BITS else int(re.findall(r'\d+', kind)[0])
    total += bits * math.prod(int(n) for n in dimensions.split(',') if n)
  return -(-total // 8)


def trip_count(module: Module, loop: Loop) -> int | None:
  """The trip count of a loop; None if unknown.

  GPU and CPU programs state it. TPU programs do not, so it is computed from the start, step and bound of the counter
  that the loop condition compares.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.instruction.attributes)
  if known:
    return int(known[1])
  condition = module.computations[loop.instruction.attribute('condition')]
  test = condition.root
  if test is None or test.opcode != 'compare':
    return None
  left, right = (_line(module, loop, condition, operand) for operand in test.operands)
  if left is None or right is None:
    return None
  (start, step), (end, other) = left, right
  difference, slope = end - start, step - other
  # The loop runs while start + slope * t <direction> end.
  match test.attribute('direction'):
    case 'LT' if slope > 0:
      return max(0, -(-difference // slope))
    case 'LE' if slope > 0:
      return max(0, difference // slope + 1)
    case 'GT' if slope < 0:
      return max(0, -(difference // -slope))
    case 'GE' if slope < 0:
      return max(0, -difference // -slope + 1)
    case 'NE' if slope and difference % slope == 0:
      return max(0, difference // slope)
  return None


def _line(module, loop, computation, name) -> tuple[int, int] | None:
  """(base, slope) of an integer in the condition or body of a loop that equals base + slope * iteration."""
  found = _offset(computation, name)
  if found is None:
    return None
  element, offset = found
  if element is None:
    return offset, 0
  start = _constant(module, loop, element)
  body = module.computations[loop.instruction.attribute('body')]
  after = _offset(body, body.root.operands[element]) if body.root.opcode == 'tuple' else None
  if start is None or after is None or after[0] != element:
    return None
  return start + offset, after[1]


def _constant(module, loop, element) -> int | None:
  """The initial value of an element of a loop's state."""
  initial = loop.owner.instructions[loop.instruction.operands[0]]
  if initial.opcode != 'tuple':
    return None
  if loop.around is None:
    found = _offset(loop.owner, initial.operands[element])
    return found[1] if found and found[0] is None else None
  line = _line(module, loop.around, loop.owner, initial.operands[element])
  return line[0] if line and line[1] == 0 else None


def _offset(computation, name) -> tuple[int | None, int] | None:
  """(element, offset) of an integer that equals that element of the computation's tuple plus offset; None: constant."""
  instruction = computation.instructions[name]
  follow = functools.partial(_offset, computation)
  match instruction.opcode:
    case 'constant' if re.fullmatch(r'-?\d+', instruction.operands[0]):
      return None, int(instruction.operands[0])
    case 'copy' | 'bitcast' | 'convert':
      return follow(instruction.operands[0])
    case 'get-tuple-element' if computation.instructions[instruction.operands[0]].opcode == 'parameter':
      return int(instruction.attribute('index')), 0
    case 'add' | 'subtract':
      left, right = map(follow, instruction.operands)
      if left is None or right is None or (right[0] is not None and (left[0] is not None or
                                                                     instruction.opcode == 'subtract')):
        return None
      sign = -1 if instruction.opcode == 'subtract' else 1
      return (left[0] if left[0] is not None else right[0]), left[1] + sign * right[1]
  return None


def _instruction(line: str) -> Instruction:
  name, rest = re.sub(r'/\*.*?\*/', '', line.removeprefix('ROOT ')).split(' = ', 1)
  shape, rest = _split_at(rest, _closing(rest) + 1) if rest.startswith('(') else rest.split(' ', 1)
  opcode, rest = rest.strip().split('(', 1)
  inner, attributes = _split_at('(' + rest, _closing('(' + rest) + 1)
  operands = tuple(part.split()[-1].lstrip('%') for part in _commas(inner[1:-1]))
  return Instruction(name.lstrip('%'), shape, opcode, operands, attributes.lstrip(', '))


def _closing(text: str) -> int:
  """The position of the bracket that closes the first one, ignoring strings."""
  depth, quoted = 0, False
  for position, character in enumerate(text):
    if character == '"' and text[position - 1] != '\\':
      quoted = not quoted
    elif not quoted and character in '([{':
      depth += 1
    elif not quoted and character in ')]}':
      depth -= 1
      if not depth:
        return position
  raise ValueError(f'This is not valid HLO: a bracket is not closed in {text[:80]!r}.')


def _split_at(text: str, position: int) -> tuple[str, str]:
  return text[:position], text[position:]


def _commas(text: str) -> list[str]:
  """Splits at the commas outside of brackets."""
  parts, depth, start = [], 0, 0
  for position, character in enumerate(text):
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth:
      parts.append(text[start:position])
      start = position + 1
  return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _strings_removed(text: str) -> str:
  return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
