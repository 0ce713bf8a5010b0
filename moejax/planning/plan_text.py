"""A plan as text."""
from moejax.planning import ahead_of_time, roofline
from moejax.planning.ahead_of_time import PodPlan
from moejax.units import duration, short, size

_LINES = 12  # of collectives; the others are summed


def write(plan: PodPlan) -> str:
  """The plan, section by section; the last line is the verdict."""
  sections = [_heading(plan), _memory(plan), _work(plan)]
  if plan.program is not None:
    sections += [_collectives(plan), _time(plan)]
  return '\n\n'.join([*sections, *([plan.notice] if plan.notice else []), verdict(plan)])


def verdict(plan: PodPlan) -> str:
  """Whether it fits, by how much, and what to change first if not."""
  memory = plan.memory
  if memory.fits:
    return (f'It fits: {size(memory.total)} of {size(memory.available)} per chip, '
            f'{memory.total / memory.available:.0%}.')
  missing = max(0, memory.total - memory.available)
  return (f'It does not fit: a step needs {"at least " if memory.refused else ""}{size(memory.total)} per chip, which '
          f'has {size(memory.available)}: {size(missing)} too little. {plan.advice}')


def _heading(plan):
  mesh = ', '.join(f'{axis} {length}' for axis, length in plan.mesh.items())
  parts = f' in {plan.accumulate} microbatches' if plan.accumulate > 1 else ''
  return _table([
      ('topology', f'{plan.topology.name}: {plan.chips} x {plan.topology.chip.kind}'),
      ('mesh', mesh),
      ('parameters', f'{short(plan.parameters["total"])}, {short(plan.parameters["active"])} active'),
      ('batch', f'{plan.batch} examples{parts}')])


def _memory(plan):
  memory = plan.memory
  rows = [('parameters', memory.parameters, ''), ('optimizer state', memory.optimizer, ''),
          ('router state, average', memory.others, ''), ('batch', memory.batch, '')]
  temporary = [('gradients', memory.gradients, 'float32, as parameters'),
               ('activations', memory.activations, 'saved for the backward pass, if sharded evenly')]
  if memory.refused:
    rows += temporary
    rest = [('total', memory.total, f'at least, of {size(memory.available)}; the compiler refused it')]
  else:
    rows += [('temporaries', memory.temporaries, 'of which'), *(('  ' + name, *row) for name, *row in temporary),
             ('  the rest', memory.working_set, 'working set of a block'),
             ('code, padding, results', memory.unaliased, '')]
    rest = [('total', memory.total, f'of {size(memory.available)}')]
  return 'memory per chip\n' + _table([(name, f'{size(number):>12}  {note}') for name, number, note in rows + rest])


def _work(plan):
  run = plan.flops * plan.chips
  rows = [('per chip', f'{short(plan.flops, "FLOPs")} in matrix products'),
          ('all chips', f'{short(run, "FLOPs")}, of which {short(plan.model_flops, "FLOPs")} '
                        f'({plan.model_flops / run:.0%}) are model FLOPs; the rest is recomputed, one-hot, or padding')]
  if plan.program is not None:
    rows.append(('memory traffic', f'{size(plan.program.traffic)} per chip, read and written'))
  return 'work per step\n' + _table(rows)


def _collectives(plan):
  rows = ahead_of_time.by_place(plan.program.collectives)
  if not rows:
    return 'collectives per step\n  none'
  def line(rows, among, what):
    number, runs = sum(row['bytes'] for row in rows), sum(row['runs'] for row in rows)
    return f'{size(number):>12} {runs:>6} {among:>6}', what

  lines = [('bytes per chip runs  among', 'kind and JAX operation')]
  lines += [line([row], row['group'], f'{row["kind"]}  {row["where"][-70:]}') for row in rows[:_LINES]]
  if rows[_LINES:]:
    lines.append(line(rows[_LINES:], '', 'others'))
  lines.append(line(rows, '', 'total'))
  note = '' if all(c.exact for c in plan.program.collectives) else (
      '\n  Loops of unknown length are counted once.')
  return 'collectives per step\n' + _table(lines) + note


def _time(plan):
  estimate = plan.program.estimate
  bound = 'compute' if estimate.compute >= estimate.memory else 'memory'
  rows = [('compute', f'{duration(estimate.compute):>12}'), ('memory', f'{duration(estimate.memory):>12}'),
          ('communication', f'{duration(estimate.communication):>12}'),
          ('step', f'{duration(estimate.step):>12}  {bound} plus communication'),
          ('MFU', f'{plan.mfu:>12.1%}')]
  return ('estimated time per step, from the compiled program\n' + _table(rows) + '\n' +
          '\n'.join(f'  - {line}' for line in roofline.assumptions(plan.topology)))


def _table(rows):
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'  {name:<{width}}  {value}'.rstrip() for name, value in rows)
