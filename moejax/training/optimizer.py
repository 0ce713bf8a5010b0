"""Optimizers and schedules by name, and which parameters weight decay applies to.

    config.optimizer = dict(name='adamw', weight_decay=0.1, clip=1.0,
                            schedule=dict(name='cosine', peak=1e-3, warmup=1000))

The state of an optimizer is a pytree; its leaves that mirror a parameter are sharded like that parameter.
"""
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import ConfigError, Registry, call
from moejax.functional import Functional, Tree, flatten, unflatten
from moejax.ranges import Count, Natural, NonNegative, Positive, Rate
from moejax.training import normalized_descent

Schedule = optax.Schedule

OPTIMIZERS = Registry('optimizer', optax.GradientTransformation, context=('schedule', 'mask', 'axes'))
SCHEDULES: Registry[Schedule] = Registry('schedule', Schedule, context=('steps',))

# Parameters that no axis name identifies, by a part of their path: learned positions, and tokens that are not words.
_NEVER_DECAYED = re.compile(r'(^|/)(\w*bias|\w*scale|\w*position\w*|\w*encoding|class_token|registers?)(/|$)')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Attributes:
    transform: optax optimizer whose updates include learning rate and weight decay.
    schedule: learning rate of step n.
  """
  transform: optax.GradientTransformation
  schedule: Schedule


def build(config: Mapping, where: str, *, model: Functional, steps: int) -> Optimizer:
  """The optimizer that `config` names, for the parameters of `model` and a run of `steps` updates.

  `config` holds the keys of the optimizer itself and those of `_Common`.

  Raises:
    ConfigError: also if `decay` or `gradient_scale` is not a regular expression, or matches no parameter.
  """
  shared = [field.name for field in dataclasses.fields(_Common)]
  common = call(_Common, {k: config[k] for k in shared if k in config}, where)
  own = {k: v for k, v in config.items() if k not in shared}
  schedule = SCHEDULES.build(common.schedule, f'{where}.schedule', steps=steps)
  mask = decay_mask(model, common.decay, f'{where}.decay')
  transform = OPTIMIZERS.build(own, where, beside=shared, schedule=schedule, mask=mask, axes=model.axes)
  if common.clip is not None:
    transform = optax.chain(optax.clip_by_global_norm(common.clip), transform)
  if common.gradient_scale is not None:
    scale = call(_GradientScale, common.gradient_scale, f'{where}.gradient_scale')
    mask = matching(model, scale.parameters, f'{where}.gradient_scale.parameters')
    transform = optax.chain(optax.masked(optax.scale(scale.factor), mask), transform)
  return Optimizer(transform, schedule)


@dataclasses.dataclass(frozen=True)
class _Common:
  """Keys of config.optimizer that all optimizers have.

  Config:
    schedule: of the learning rate, one of `SCHEDULES`.
    clip: maximum global norm, to which larger gradients are scaled down; None: no clipping.
    decay: regular expression; parameters whose path it matches decay. None: see `decayed_by_default`.
    gradient_scale: dict(parameters=, factor=): see `_GradientScale`; None: no scaling.
  """
  schedule: dict
  clip: Positive | None = None
  decay: str | None = None
  gradient_scale: dict | None = None


@dataclasses.dataclass(frozen=True)
class _GradientScale:
  """Multiplies gradients, before they are clipped.

  With batches balanced over domains, DEMix is factor=E for its experts (every expert's gradient is a mean over its own
  domain); fairseq, which divides the experts' sums over workers by the square root of their number, is factor=sqrt(E)
  with one expert per worker. factor=0 freezes parameters, except for weight decay.

  Config:
    parameters: regular expression that matches their paths.
    factor: multiplies their gradients.
  """
  parameters: str
  factor: NonNegative


# ---- optimizers -----------------------------------------------------------------------------------------------------


@OPTIMIZERS('adamw')
def adamw(*, schedule: Schedule, mask: Tree, b1: Rate = 0.9, b2: Rate = 0.999, eps: Positive = 1e-8,
          weight_decay: NonNegative = 0.0) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019, algorithm 2); the decay is multiplied by the learning rate.

  Config:
    b1: decay of the mean of gradients.
    b2: decay of the mean of squared gradients.
    eps: added to the root of the second moment.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


@OPTIMIZERS('adafactor')
def adafactor(*, schedule: Schedule, mask: Tree, min_dim_size_to_factor: Count = 128, decay_rate: Positive = 0.8,
              clipping_threshold: Positive = 1.0, multiply_by_parameter_scale: bool = True,
              momentum: Rate | None = None, weight_decay: NonNegative = 0.0) -> optax.GradientTransformation:
  """Adafactor (Shazeer & Stern 2018). Decay is multiplied by the learning rate, as in AdamW.

  Config:
    min_dim_size_to_factor: second moments of narrower matrices are not factored.
    decay_rate: exponent by which the decay of second moments grows with the step.
    clipping_threshold: maximum root mean square of an update.
    multiply_by_parameter_scale: makes steps relative to the size of the parameter.
    momentum: decay of the mean of updates; None: no momentum.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.chain(
      optax.adafactor(None, min_dim_size_to_factor=min_dim_size_to_factor, decay_rate=decay_rate,
                      clipping_threshold=clipping_threshold, momentum=momentum,
                      multiply_by_parameter_scale=multiply_by_parameter_scale),
      # Without a rate of its own optax.adafactor already returns the descent direction.
      optax.add_decayed_weights(-weight_decay, mask=mask),
      optax.scale_by_learning_rate(schedule, flip_sign=False))


@OPTIMIZERS('lion')
def lion(*, schedule: Schedule, mask: Tree, b1: Rate = 0.9, b2: Rate = 0.99,
         weight_decay: NonNegative = 0.0) -> optax.GradientTransformation:
  """Lion (Chen et al. 2023, algorithm 2).

  Config:
    b1: weight of the old mean in the update.
    b2: decay of the mean of gradients.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)


@OPTIMIZERS('sgd')
def sgd(*, schedule: Schedule, mask: Tree, momentum: Rate | None = None, nesterov: bool = False,
        weight_decay: NonNegative = 0.0) -> optax.GradientTransformation:
  """Gradient descent with momentum; decay is added after momentum (decoupled).

  Config:
    momentum: decay of the sum of gradients; None: no momentum.
    nesterov: whether it is Nesterov's momentum, which looks one step ahead.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.chain(
      optax.trace(momentum, nesterov) if momentum is not None else optax.identity(),
      optax.add_decayed_weights(weight_decay, mask=mask),
      optax.scale_by_learning_rate(schedule))


@OPTIMIZERS('normalized_sgd')
def normalized_sgd(*, schedule: Schedule, mask: Tree, axes: Tree, momentum: Rate | None = None,
                   others: NonNegative = 1.0, weight_decay: NonNegative = 0.0) -> optax.GradientTransformation:
  """Gradient descent with momentum on normalised expert gradients (2208.02813, equation 3.4); decay precedes momentum.

  Config:
    momentum: decay of the sum of gradients; None: no momentum.
    others: learning rate of all other parameters, above all routers, as a multiple of the experts'.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.chain(
      normalized_descent.normalized_by_expert(axes),
      optax.add_decayed_weights(weight_decay, mask=mask),
      optax.trace(momentum) if momentum is not None else optax.identity(),
      normalized_descent.scale_others(axes, others),
      optax.scale_by_learning_rate(schedule))


# ---- schedules: warm up linearly from 0 to `peak`, then ... ----------------------------------------------------------


@SCHEDULES('constant')
def constant(*, steps: int, peak: Positive, warmup: Natural = 0) -> Schedule:
  """Constant at `peak`.

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it.
  """
  _check(steps, warmup)
  return _warmed_up(peak, warmup, lambda step: jnp.full_like(step, peak))


@SCHEDULES('linear')
def linear(*, steps: int, peak: Positive, warmup: Natural = 0, end: NonNegative = 0.0) -> Schedule:
  """Linear decay to `end` at the last step.

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it.
    end: learning rate at the last step.
  """
  _check(steps, warmup)
  return _warmed_up(peak, warmup, lambda step: peak + (end - peak) * _progress(step, warmup, steps))


@SCHEDULES('cosine')
def cosine(*, steps: int, peak: Positive, warmup: Natural = 0, end: NonNegative = 0.0) -> Schedule:
  """Cosine decay to `end` at the last step (Loshchilov & Hutter 2017, equation 5, without restarts).

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it.
    end: learning rate at the last step.
  """
  _check(steps, warmup)
  return _warmed_up(peak, warmup, lambda step: end + (peak - end) * 0.5 * (
      1 + jnp.cos(jnp.pi * _progress(step, warmup, steps))))


@SCHEDULES('rsqrt')
def rsqrt(*, steps: int, peak: Positive, warmup: Natural, cooldown: Natural = 0) -> Schedule:
  """`peak * sqrt(warmup / step)`; the last `cooldown` steps decay linearly to 0 (Zhai et al. 2022, section 3.5).

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it; 0 starts at `peak` and decays as 1 does.
    cooldown: number of last steps, which decay linearly to 0.
  """
  _check(steps, warmup + cooldown)
  scale = max(warmup, 1)

  def decay(step):
    rate = peak * jnp.sqrt(scale / jnp.maximum(step, scale))
    return rate * jnp.clip((steps - step) / cooldown, 0, 1) if cooldown else rate
  return _warmed_up(peak, warmup, decay)


def _check(steps, warmup):
  if warmup >= steps:
    raise ConfigError(f': {warmup} steps of warm-up (and cool-down) must be fewer than the {steps} of '
                      'config.training.steps. Shorten them, or raise config.training.steps.')


def _progress(step, warmup, steps):
  return jnp.clip((step - warmup) / (steps - warmup), 0, 1)


def _warmed_up(peak, warmup, after) -> Schedule:
  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    return jnp.where(step < warmup, peak * step / max(warmup, 1), after(step))
  return schedule


# ---- which parameters decay -----------------------------------------------------------------------------------------


def decay_mask(model: Functional, decay: str | None, where: str) -> Tree:
  """A bool for every parameter of `model`. Raises ConfigError if `decay` is invalid or matches nothing."""
  axes, shapes = flatten(model.axes), flatten(model.shapes()[0])
  if decay is None:
    return unflatten({path: decayed_by_default(path, axes[path], shapes[path].shape) for path in shapes})
  return matching(model, decay, where)


def matching(model: Functional, expression: str, where: str) -> Tree:
  """Whether the regular `expression` matches in the path of each parameter. Raises ConfigError if it matches none."""
  paths = flatten(model.shapes()[0])
  try:
    pattern = re.compile(expression)
  except re.error as error:
    raise ConfigError(f'{where}: {expression!r} is not a regular expression ({error}).') from None
  mask = {path: bool(pattern.search(path)) for path in paths}
  if not any(mask.values()):
    raise ConfigError(f'{where}: {expression!r} matches no parameter path; the paths are '
                      f'{", ".join(sorted(paths)[:8])}, ...')
  return unflatten(mask)


def decayed_by_default(path: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> bool:
  """Whether this is a kernel or a word embedding, and not a bias, a norm's scale or a learned position.

  The number of dimensions alone does not decide: a stack of layers or experts makes a matrix of each bias, and
  attention biases have two dimensions, heads and their width. So these axes are not counted.
  """
  named = list(zip(axes, shape))
  if named and named[0][0] == 'layers':
    named = named[1:]
  if named and named[0][0] == 'expert':
    named = named[1:]
  named = [(name, size) for name, size in named if name != 'head_dim' and (name or size > 1)]
  return len(named) >= 2 and not any(name == 'length' for name, _ in named) and not _NEVER_DECAYED.search(path)


# ---- sharding, averages, statistics ---------------------------------------------------------------------------------


def state_shardings(transform: optax.GradientTransformation, params: Tree, shardings: Tree, otherwise: Any) -> Any:
  """The sharding of every leaf of the optimizer's state: that of the parameter it mirrors, or `otherwise`.

  A leaf mirrors a parameter if its path ends in the parameter's and its shape is the same, or (Adafactor's factors) lacks
  one dimension of it.
  """
  flat, flat_shardings = flatten(params), flatten(shardings)

  def mirrored(name, shape):
    whole, sharding = flat[name].shape, flat_shardings[name]
    if shape == whole:
      return sharding
    spec = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
    for i in range(len(whole)):
      if shape == whole[:i] + whole[i + 1:]:
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:i], *spec[i + 1:]))
    return None

  def sharding(path, leaf):
    # dict keys have `.key`; the containers of optax above them are attributes and positions
    names = [str(part.key) if isinstance(part, jax.tree_util.DictKey) else None for part in path]
    for start in range(len(names)):
      name = '/'.join(name or '' for name in names[start:]) if None not in names[start:] else None
      if name in flat and (found := mirrored(name, leaf.shape)):
        return found
    return otherwise

  return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(transform.init, params))


def at_step(opt_state: Any, step: jax.Array) -> Any:
  """`opt_state` with its schedule set to `step`: the learning rate depends on the step, not on what was skipped before.

  All other counters count updates, as the bias correction of moments requires.
  """
  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)
  return jax.tree.map(lambda node: node._replace(count=step) if is_schedule(node) else node, opt_state,
                      is_leaf=is_schedule)


def moving_average(average: Tree, params: Tree, decay: float) -> Tree:
  """`decay * average + (1 - decay) * params`, leaf by leaf (Polyak averaging with exponential forgetting)."""
  return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def not_finite(tree: Any) -> jax.Array:
  """<int32>[] How many floating-point arrays of `tree` hold NaN or infinity."""
  return sum(((~jnp.isfinite(leaf).all()).astype(jnp.int32) for leaf in jax.tree.leaves(tree)
              if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.int32(0))


def norms_by_module(tree: Tree) -> dict[str, jax.Array]:
  """<float32>[] Euclidean norm of every module's own leaves, by the module's path, in the order of the tree."""
  squares: dict[str, jax.Array] = {}
  for path, leaf in flatten(tree).items():
    module = path.rpartition('/')[0] or path
    squares[module] = squares.get(module, 0.) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return {module: jnp.sqrt(square) for module, square in squares.items()}
