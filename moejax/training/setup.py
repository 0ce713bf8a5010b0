"""From a config to everything a run needs. Errors in it are found here, before anything is compiled."""
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from moejax import data, evaluation, models
from moejax.config import ConfigError, call, nearest
from moejax.evaluation import groups
from moejax.functional import Functional
from moejax.parallel import mesh as mesh_lib
from moejax.parallel import processes, rules
from moejax.random import derive
from moejax.ranges import Above, Below, Count, Natural
from moejax.training import initial, methods, objectives, optimizer, step, workdir
from moejax.training.durability import resume
from moejax.training.durability.checkpoint import CheckpointConfig
from moejax.training.durability.recovery import RecoveryConfig
from moejax.training.loggers import LOGGERS
from moejax.training.profile import ProfileConfig

_EVALUATORS = 'config.evaluation.evaluators'


def default_config() -> ConfigDict:
  """The config that config files start from; they add `model`, `objective`, `data`, and change other keys as needed.

      seed        every random number of the run follows from it
      method      `methods`: name, its own keys
      init        `initial`: name, its own keys
      optimizer   `optimizer.build`: name, its own keys, clip, decay, schedule
      training    `Training`: steps, log_every, accumulate, average
      evaluation  `Evaluation`: every, evaluators
      checkpoint  `checkpoint.CheckpointConfig`: every, keep, metric, mode
      recovery    `recovery.RecoveryConfig`: skip, spike, patience, max_rollbacks, slow_data, data_timeout, collapse
      mesh        `parallel.mesh.build`: sizes of data, fsdp, expert, model
      sharding    `parallel.rules.build`: zero, sequence
      report      `Report`: at
      loggers     names of `loggers.LOGGERS`
      profile     `profile.ProfileConfig`: start, steps
  """
  return ConfigDict(dict(
      seed=0,
      method=dict(name='plain'),
      init=resume.DRAWN,
      optimizer=dict(name='adamw', weight_decay=0.0, clip=1.0, schedule=dict(name='cosine', peak=1e-3, warmup=100)),
      training=dict(steps=1000, log_every=50, accumulate=1, average=config_dict.placeholder(float)),
      evaluation=dict(every=config_dict.placeholder(int), evaluators=dict()),
      checkpoint=dict(every=500, keep=2, metric=config_dict.placeholder(str), mode='max'),
      recovery=dict(skip='not_finite', spike=10.0, patience=10, max_rollbacks=3, slow_data=30.0, data_timeout=600.0,
                    collapse=0.9),
      mesh=dict(data=-1, fsdp=1, expert=1, model=1),
      sharding=dict(zero=3, sequence=False),
      report=dict(at='end'),
      loggers=Sections.loggers,
      profile=dict(start=config_dict.placeholder(int), steps=5)))


@dataclasses.dataclass(frozen=True)
class Training:
  """config.training.

  Attributes:
    steps: total number of batches. If a command sets fewer than the config file, warm-up and cool-down shrink to at
      most half of them, unless it sets these too. May grow when the run resumes.
    log_every: steps between rows of metrics.
    accumulate: microbatches per step; each device holds the activations of one at a time.
    average: decay of an exponential moving average of the parameters, which is then evaluated; None: no average.
  """
  steps: Count
  log_every: Count = 50
  accumulate: Count = 1
  average: Annotated[float, Above(0), Below(1)] | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """config.evaluation.

  Attributes:
    every: steps between evaluations; None: only after the last step, which is always evaluated.
    evaluators: `{name: dict(name=<evaluator>, batch_size=<rows>, ...)}`; the default batch size is
      that of a microbatch in training. Another one is refused if it would change the decisions of routers.
  """
  every: Count | None = None
  evaluators: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
  """config.report: whether the finished run writes report/index.html.

  Config:
    at: when it is written.
  """
  at: Literal['end', 'never'] = 'end'


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything a run is made of; nothing is allocated yet. `config` is a ConfigDict, whose keys no type knows."""
  config: Any
  seed: int
  mesh: jax.sharding.Mesh
  rules: rules.Rules
  model: Functional
  objective: objectives.Objective
  method: Any
  init: initial.Init
  optimizer: optimizer.Optimizer
  pipeline: Any
  evaluators: dict[str, Any]
  training: Training
  evaluation: Evaluation
  checkpoint: CheckpointConfig
  recovery: RecoveryConfig
  report: Report
  loggers: Sequence[str]
  profile: ProfileConfig

  @property
  def rows(self) -> np.ndarray:
    """The rows of training batches that this process feeds."""
    return processes.local_rows(self.mesh, self.pipeline.batch_size)

  @property
  def microbatch(self) -> int:
    """Rows per forward pass, in training and (unless an evaluator sets its own) in evaluation."""
    return self.pipeline.batch_size // self.training.accumulate

  def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the devices of the mesh, from the `rows` of it in every process."""
    return processes.place(self.mesh, batch)


def prepare(config: Mapping | ConfigDict, devices: Sequence[Any] | None = None) -> Setup:
  """Builds and checks everything that `config` names, for a run on `devices` (all there are, by default).

  Raises:
    ConfigError: the config is wrong, or its parts do not fit together; the message says what to do.
  """
  setup = build(config, devices)
  _check_best(setup)
  _check_batch(setup)
  setup.profile.check(setup.training.steps)
  setup = dataclasses.replace(setup, evaluators=_evaluators(setup.evaluation, setup.pipeline, setup.model, setup.mesh,
                                                            setup.microbatch))
  _trace(setup)
  _trace_evaluators(setup)
  return setup


def build(config: Mapping | ConfigDict, devices: Sequence[Any] | None = None) -> Setup:
  """What `prepare` returns, without the checks that the parts fit together."""
  sections: Any = _checked(config)
  training = call(Training, sections.training, 'config.training')
  evaluated = call(Evaluation, sections.evaluation, 'config.evaluation')
  mesh = mesh_lib.build(sections.mesh, 'config.mesh', devices)
  sharding = call(rules.build, sections.sharding, 'config.sharding')
  pipeline = data.build(sections.data, 'config.data')
  with rules.use(mesh, sharding):
    model = models.build(sections.model, 'config.model')
  pipeline.check(sections.model)
  return Setup(
      config=sections, seed=sections.seed, mesh=mesh, rules=sharding, model=model, pipeline=pipeline, training=training,
      evaluation=evaluated, report=call(Report, sections.report, 'config.report'),
      objective=objectives.build(sections.objective, 'config.objective'),
      method=methods.METHODS.build(sections.method, 'config.method'),
      init=initial.INITS.build(sections.get('init', resume.DRAWN), 'config.init'),
      optimizer=optimizer.build(sections.optimizer, 'config.optimizer', model=model, steps=training.steps),
      checkpoint=call(CheckpointConfig, sections.checkpoint, 'config.checkpoint'),
      recovery=call(RecoveryConfig, sections.recovery, 'config.recovery'),
      evaluators=_evaluators(evaluated, pipeline, model, mesh),
      loggers=_loggers(sections.get('loggers', Sections.loggers)),
      profile=call(ProfileConfig, sections.get('profile', {}), 'config.profile'))


@dataclasses.dataclass(frozen=True)
class Sections:
  """The sections of a config; there are no others.

  Config:
    seed: every random number of the run follows from it.
    model: the model; see `moejax.models`.
    objective: the loss that is minimised.
    method: how the objective is computed from a batch.
    data: the training data and their batches.
    optimizer: see `optimizer.build`.
    training: see `Training`.
    evaluation: see `Evaluation`.
    checkpoint: see `checkpoint.CheckpointConfig`.
    recovery: handling of failures; see `recovery.RecoveryConfig`.
    mesh: sizes of the axes of the device mesh.
    sharding: how the model is sharded over the mesh.
    report: see `Report`.
    loggers: where metrics go besides metrics.jsonl: names of `loggers.LOGGERS`, such as 'csv'.
    profile: see `profile.ProfileConfig`.
    init: how the parameters of a new run start; see `initial`.
  """
  seed: Natural
  model: Mapping
  objective: Mapping
  method: Mapping
  data: Mapping
  optimizer: Mapping
  training: Mapping
  evaluation: Mapping
  checkpoint: Mapping
  recovery: Mapping
  mesh: Mapping
  sharding: Mapping
  report: Mapping
  loggers: Sequence[str] = ('tensorboard',)
  profile: Mapping = dataclasses.field(default_factory=dict)
  init: Mapping = dataclasses.field(default_factory=lambda: resume.DRAWN)


def _loggers(names: Sequence[str]) -> tuple[str, ...]:
  for name in names:
    if name not in LOGGERS:
      raise ConfigError(f'config.loggers: there is no logger {name!r}. {nearest(name, LOGGERS)}')
  return tuple(names)


def _checked(config: Any) -> ConfigDict:
  checked: Any = ConfigDict(config).copy_and_resolve_references()
  call(Sections, checked, 'config')
  workdir.dumps(checked)  # Raises where a value cannot be written to config.json.
  return checked


def _check_best(setup: Setup) -> None:
  metric, every = setup.checkpoint.metric, setup.evaluation.every
  if metric is None:
    return
  allowed = [f'eval/{name}/' for name in setup.evaluators]
  if not metric.startswith(tuple(allowed)):
    raise ConfigError(f'config.checkpoint.metric {metric!r} belongs to no evaluator: it must start with '
                      f'{" or ".join(allowed) or "eval/<evaluator>/, and config.evaluation.evaluators is empty"}.')
  if every is None or setup.checkpoint.every % every:
    raise ConfigError(f'config.checkpoint.every ({setup.checkpoint.every}) must be a multiple of '
                      f'config.evaluation.every ({every}), so that every checkpoint has a {metric}, by which the best '
                      'one is kept.')


def _check_batch(setup: Setup) -> None:
  spec = setup.pipeline.batch_spec()
  for alternatives in setup.objective.needs:
    if not set(alternatives) & set(spec):
      raise ConfigError(f'config.objective {setup.config.objective.name!r} needs batches with '
                        f'{" or ".join(alternatives)}, and config.data gives {", ".join(sorted(spec))}. '
                        'Choose an objective that fits the data.')
  size = next(iter(spec.values())).shape[0]
  shards, count = rules.batch_shards(setup.mesh), setup.training.accumulate
  if size % (shards * count):
    unit = shards * count
    nearest = ' or '.join(str(n) for n in (size // unit * unit, -(-size // unit) * unit) if n)
    raise ConfigError(f'config.data.batch_size {size} must be a multiple of {unit}: {shards} shards of the mesh '
                      f'(data x fsdp x expert) times {count} of config.training.accumulate. Nearest: {nearest}.')


def _evaluators(options: Evaluation, pipeline: Any, model: Functional, mesh: jax.sharding.Mesh,
                batch_size: int | None = None) -> dict[str, evaluation.Evaluator]:
  return evaluation.build(options.evaluators, _EVALUATORS, batch_size=batch_size, pipeline=pipeline, apply=model.apply,
                          mesh=mesh)


def _trace_evaluators(setup: Setup) -> None:
  shapes = setup.model.shapes()
  for name, evaluator in setup.evaluators.items():
    size = setup.config.evaluation.evaluators[name].get('batch_size')
    if size not in (None, setup.microbatch):
      with rules.use(setup.mesh):
        groups.check(setup.model.apply, *shapes, setup.pipeline.batch_spec(setup.microbatch),
                     setup.pipeline.batch_spec(size), f'{_EVALUATORS}.{name}.batch_size')
    evaluator.trace(*shapes)


def _trace(setup: Setup) -> None:
  # Shapes that do not fit are found by tracing the loss; it takes seconds, compiling can take minutes.
  params, router_state = setup.model.shapes()
  key = derive(jax.random.key(0), 'trace')
  with rules.use(setup.mesh, setup.rules):
    batch = jax.eval_shape(setup.pipeline.augment, setup.pipeline.batch_spec(), key)
    jax.eval_shape(functools.partial(step.loss_function, setup), params, router_state, batch, key, np.float32(1))
