"""Compiles the real training step for hardware that is not present, and predicts its memory and time.

    topology = topologies.load('v5e:16x16')
    found = plan(setup.prepare(config, topology.devices), topology)
    found.memory.fits, found.estimate.step, found.mfu
"""
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from moejax.config import ConfigError
from moejax.models.counts import parameter_counts
from moejax.parallel import mesh as mesh_lib
from moejax.parallel.flops import flops
from moejax.planning import memory as memory_lib
from moejax.planning import roofline
from moejax.planning.advice import advise, exchanges, spell
from moejax.planning.collectives import Collective, collectives
from moejax.planning.topologies import Topology
from moejax.planning.traffic import traffic
from moejax.training import spanning_groups
from moejax.training import step as step_lib
from moejax.training.setup import Setup
from moejax.training.speed import model_flops

# Announces a stage of the work, which runs while the context is open.
Stage = Callable[[str], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """Properties of the compiled step; unknown if the compiler refused it.

  Attributes:
    traffic: bytes that one chip reads from and writes to its memory.
    collectives: all collectives.
    estimate: lower bound of the seconds of a step.
  """
  traffic: float
  collectives: list[Collective]
  estimate: roofline.Estimate


@dataclasses.dataclass(frozen=True)
class PodPlan:
  """The plan of a training step on a topology.

  Attributes:
    topology: the hardware.
    mesh: sizes of the axes.
    parameters: `total` and `active`.
    batch: examples per step.
    accumulate: microbatches per step.
    flops: of all matrix products that one chip runs in a step, including recomputation and padding.
    model_flops: model FLOPs of a step, forward and backward, over all chips.
    notice: what makes routing slow on this mesh, and what to set; None if nothing does.
    memory: memory of one chip.
    program: None if the compiler refused it.
    advice: what to change first; None if the step fits.
  """
  topology: Topology
  mesh: dict[str, int]
  parameters: dict[str, int]
  batch: int
  accumulate: int
  flops: float
  model_flops: float
  notice: str | None
  memory: memory_lib.Memory
  program: CompiledStep | None
  advice: str | None

  @property
  def chips(self) -> int:
    """Number of chips of the topology."""
    return len(self.topology.devices)

  @property
  def mfu(self) -> float | None:
    """Upper bound of the MFU: model FLOPs divided by the peak FLOPs of all chips in the estimated time of a step."""
    if self.program is None:
      return None
    return self.model_flops / (self.program.estimate.step * self.topology.chip.peak * self.chips)


def plan(setup: Setup, topology: Topology, stage: Stage = lambda name: contextlib.nullcontext()) -> PodPlan:
  """Compiles the training step of `setup`, which must be prepared for the devices of `topology`.

  Raises:
    ConfigError: the topology's compiler does not support the step.
  """
  state = step_lib.abstract_state(setup)
  batch = step_lib.abstract_batch(setup)
  # Kernels read their target from the mesh.
  with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
    with stage('tracing the training step'):
      traced = step_lib.make_train_step(setup).trace(state, batch)
    with stage('lowering it'):
      lowered = traced.lower()
  with stage('counting parameters and FLOPs'):
    known: dict[str, Any] = dict(
        topology=topology, mesh=dict(setup.mesh.shape), parameters=parameter_counts(setup.model, batch),
        batch=next(iter(batch.values())).shape[0], accumulate=setup.training.accumulate,
        flops=_flops(setup, state, batch) / len(topology.devices), model_flops=model_flops(setup),
        notice=spanning_groups.notice(setup))
  available = topology.chip.memory
  with tempfile.TemporaryDirectory() as dump:
    with stage(f'compiling it for {topology.name}'):
      try:
        compiled = lowered.compile(compiler_options={'xla_dump_to': dump, 'xla_dump_hlo_as_text': True})
      except jax.errors.JaxRuntimeError as error:
        if 'Ragged all-to-all is currently not supported' in str(error):
          keys = spell(dict.fromkeys(exchanges(setup.config), 'all_gather'))
          raise ConfigError(f'--topology={topology.name}: its compiler does not support ragged all-to-all for this '
                            f'shape. Set {keys}, give the router a capacity, or choose another topology.') from None
        if 'RESOURCE_EXHAUSTED' not in str(error) or 'hbm' not in str(error).lower():
          raise
        memory = memory_lib.of_refused(setup, state, batch, available, str(error))
        with stage('estimating what would fit'):
          return PodPlan(**known, memory=memory, program=None, advice=advise(setup, memory, topology))
    with stage('reading the program'):
      memory = memory_lib.of_program(setup, state, batch, available, compiled.memory_analysis())
      program = _read(_text(compiled, pathlib.Path(dump)), setup, topology, known['flops'])
  if memory.fits:
    return PodPlan(**known, memory=memory, program=program, advice=None)
  with stage('estimating what would fit'):
    return PodPlan(**known, memory=memory, program=program, advice=advise(setup, memory, topology))


def _text(compiled, dump: pathlib.Path) -> str:
  """The text of an optimised program; `dump` is the compiler's dump directory."""
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError:
    # XLA cannot parse some asynchronous operations of libtpu 0.0.52 ("async-update instruction should have 1
    # operands"). Only the compiler itself can print them.
    return next(dump.glob('**/*step*.after_codegen.txt')).read_text()


def as_dict(found: PodPlan) -> dict[str, Any]:
  """The plan as a JSON object: bytes, seconds, FLOPs, with collectives summed by kind and operation."""
  program = None
  if found.program is not None:
    estimate = found.program.estimate
    program = dict(
        traffic_bytes=found.program.traffic,
        seconds=dict(step=estimate.step, **dataclasses.asdict(estimate)), mfu=found.mfu,
        collectives=by_place(found.program.collectives),
        every_loop_is_counted=all(c.exact for c in found.program.collectives))
  return dict(
      topology=found.topology.name, chip=dataclasses.asdict(found.topology.chip), chips=found.chips, mesh=found.mesh,
      parameters=found.parameters, batch_size=found.batch, accumulate=found.accumulate,
      memory_bytes=dataclasses.asdict(found.memory), fits=found.memory.fits, flops_per_chip=found.flops,
      model_flops=found.model_flops, program=program, notice=found.notice,
      advice=found.advice,
      assumptions=roofline.assumptions(found.topology))


def by_place(found: list[Collective]) -> list[dict[str, Any]]:
  """Collectives summed by kind, group size and JAX operation, most bytes first."""
  sums: dict[tuple, list] = {}
  for c in found:
    entry = sums.setdefault((c.kind, c.group_size, c.where), [0, 0, 0.])
    entry[0] += c.times
    entry[1] += c.times * c.bytes
    entry[2] += c.times * c.sent
  rows = [dict(kind=kind, group=group, runs=runs, bytes=size, sent=sent, where=where)
          for (kind, group, where), (runs, size, sent) in sums.items()]
  return sorted(rows, key=lambda row: -row['bytes'])


def _flops(setup, state, batch) -> float:
  # Traced for a single device, where buffers have no padding and nothing is computed twice.
  mesh = mesh_lib.build({}, devices=setup.mesh.devices.ravel()[:1])
  unsharded = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    alone = functools.partial(step_lib.train_step, dataclasses.replace(setup, mesh=mesh))
    return flops(jax.make_jaxpr(alone)(*unsharded((state, batch))).jaxpr)


def _read(text, setup, topology, flops_of_chip) -> CompiledStep:
  found, moved = collectives(text), traffic(text)
  seconds = roofline.estimate(topology, setup.mesh.devices.ravel(), flops_of_chip, moved, found)
  return CompiledStep(moved, found, seconds)
