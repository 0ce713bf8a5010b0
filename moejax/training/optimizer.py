"""Optimizers and schedules by name, and which parameters weight decay applies to.

    config.optimizer = dict(name='adamw', weight_decay=0.1, clip=1.0,
                            schedule=dict(name='cosine', peak=1e-3, warmup=1000))

The state of any of them is a pytree whose leaves that mirror a parameter are sharded as that parameter is.
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

OPTIMIZERS = Registry('optimizer')
SCHEDULES = Registry('schedule')

Schedule = optax.Schedule

# Parameters that no axis name gives away, by a part of their path: learned positions, and tokens that are not words.
_NEVER_DECAYED = re.compile(r'(^|/)(\w*bias|\w*scale|\w*position\w*|\w*encoding|class_token|registers?)(/|$)')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Attributes:
    transform: what optax calls an optimizer; its updates include the learning rate and the decay.
    schedule: learning rate of step n.
  """
  transform: optax.GradientTransformation
  schedule: Schedule


def build(config: Mapping, where: str, *, model: Functional, steps: int) -> Optimizer:
  """The optimizer that `config` names, for the parameters of `model` and a run of `steps` updates.

  Besides the keys of the optimizer itself there are those of `_Common`.

  Raises:
    ConfigError: also where `decay` or `gradient_scale` is no regular expression, or matches no parameter.
  """
  shared = [field.name for field in dataclasses.fields(_Common) if field.name != 'where']
  common = call(_Common, {k: config[k] for k in shared if k in config}, where)
  own = {k: v for k, v in config.items() if k not in shared}
  schedule = SCHEDULES.build(common.schedule, f'{where}.schedule', steps=steps)
  mask = decay_mask(model, common.decay, f'{where}.decay')
  transform = OPTIMIZERS.build(own, where, beside=shared, schedule=schedule, mask=mask, axes=model.axes)
  if common.clip is not None:
    transform = optax.chain(optax.clip_by_global_norm(common.clip), transform)
  if common.gradient_scale is not None:
    scale = call(_GradientScale, common.gradient_scale, f'{where}.gradient_scale')
    mask = matching(model, scale.parameters, f'{scale.where}.parameters')
    transform = optax.chain(optax.masked(optax.scale(scale.factor), mask), transform)
  return Optimizer(transform, schedule)


@dataclasses.dataclass(frozen=True)
class _Common:
  """Keys of config.optimizer that all optimizers have.

  Config:
    schedule: of the learning rate, one of `SCHEDULES`.
    clip: gradients are scaled down to this global norm where theirs is larger; None: never.
    decay: regular expression; parameters whose path it finds decay. None: those of `decayed_by_default`.
    gradient_scale: dict(parameters=, factor=): see `_GradientScale`; None: no gradient is scaled.
  """
  where: str
  schedule: dict
  clip: Positive | None = None
  decay: str | None = None
  gradient_scale: dict | None = None


@dataclasses.dataclass(frozen=True)
class _GradientScale:
  """Gradients that are multiplied, before they are clipped.

  With batches balanced over domains, DEMix is factor=E for its experts (every expert's gradient is a mean over its own
  domain); fairseq, which divides the experts' sums over workers by the square root of their number, is factor=sqrt(E)
  with an expert on each. With factor=0 parameters stay as they are, unless they decay.

  Config:
    parameters: regular expression for paths of parameters.
    factor: what their gradients are multiplied by.
  """
  where: str
  parameters: str
  factor: NonNegative


# ---- optimizers -----------------------------------------------------------------------------------------------------


@OPTIMIZERS('adamw')
def adamw(*, schedule: Schedule, mask: Tree, b1: Rate = 0.9, b2: Rate = 0.999, eps: Positive = 1e-8,
          weight_decay: NonNegative = 0.0):
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
              momentum: Rate | None = None, weight_decay: NonNegative = 0.0):
  """Adafactor (Shazeer & Stern 2018). Decay is multiplied by the learning rate, as in AdamW.

  Config:
    min_dim_size_to_factor: matrices narrower than this keep a second moment of their own shape.
    decay_rate: exponent by which the decay of second moments grows with the step.
    clipping_threshold: root mean square that an update may have.
    multiply_by_parameter_scale: makes steps relative to the size of the parameter.
    momentum: decay of the mean of updates; None: there is no momentum.
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
def lion(*, schedule: Schedule, mask: Tree, b1: Rate = 0.9, b2: Rate = 0.99, weight_decay: NonNegative = 0.0):
  """Lion (Chen et al. 2023, algorithm 2).

  Config:
    b1: weight of the old mean in the update.
    b2: decay of the mean of gradients.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)


@OPTIMIZERS('sgd')
def sgd(*, schedule: Schedule, mask: Tree, momentum: Rate | None = None, nesterov: bool = False,
        weight_decay: NonNegative = 0.0):
  """Gradient descent with momentum; decay is added to the gradient's direction after momentum (decoupled).

  Config:
    momentum: decay of the sum of gradients; None: there is no momentum.
    nesterov: looks one step ahead.
    weight_decay: decay of the parameters, as a multiple of the learning rate.
  """
  return optax.chain(
      optax.trace(momentum, nesterov) if momentum is not None else optax.identity(),
      optax.add_decayed_weights(weight_decay, mask=mask),
      optax.scale_by_learning_rate(schedule))


@OPTIMIZERS('normalized_sgd')
def normalized_sgd(*, schedule: Schedule, mask: Tree, axes: Tree, momentum: Rate | None = None,
                   others: NonNegative = 1.0, weight_decay: NonNegative = 0.0):
  """Gradient descent with momentum on experts' gradients of equal size (2208.02813, equation 3.4), decay before it.

  Config:
    momentum: decay of the sum of gradients; None: there is no momentum.
    others: learning rate of all other parameters, routers first of all, as a multiple of the experts'.
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
def constant(*, steps: int, where: str, peak: Positive, warmup: Natural = 0) -> Schedule:
  """`peak` for ever.

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it.
  """
  _check(where, steps, warmup)
  return _warmed_up(peak, warmup, lambda step: jnp.full_like(step, peak))


@SCHEDULES('linear')
def linear(*, steps: int, where: str, peak: Positive, warmup: Natural = 0, end: NonNegative = 0.0) -> Schedule:
  """On a straight line to `end` at the last step.

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it.
    end: learning rate at the last step.
  """
  _check(where, steps, warmup)
  return _warmed_up(peak, warmup, lambda step: peak + (end - peak) * _progress(step, warmup, steps))


@SCHEDULES('cosine')
def cosine(*, steps: int, where: str, peak: Positive, warmup: Natural = 0, end: NonNegative = 0.0) -> Schedule:
  """Half a cosine down to `end` at the last step (Loshchilov & Hutter 2017, equation 5, without restarts).

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it.
    end: learning rate at the last step.
  """
  _check(where, steps, warmup)
  return _warmed_up(peak, warmup, lambda step: end + (peak - end) * 0.5 * (
      1 + jnp.cos(jnp.pi * _progress(step, warmup, steps))))


@SCHEDULES('rsqrt')
def rsqrt(*, steps: int, where: str, peak: Positive, warmup: Natural, cooldown: Natural = 0) -> Schedule:
  """`peak * sqrt(warmup / step)`; the last `cooldown` steps go linearly to 0 (Zhai et al. 2022, section 3.5).

  Config:
    peak: largest learning rate.
    warmup: steps of linear growth to it; 0 starts at `peak` and decays as 1 does.
    cooldown: last steps, of linear decay to 0.
  """
  _check(where, steps, warmup + cooldown)
  scale = max(warmup, 1)

  def decay(step):
    rate = peak * jnp.sqrt(scale / jnp.maximum(step, scale))
    return rate * jnp.clip((steps - step) / cooldown, 0, 1) if cooldown else rate
  return _warmed_up(peak, warmup, decay)


def _check(where, steps, warmup):
  if warmup >= steps:
    raise ConfigError(f'{where}: {warmup} steps of warm-up (and cool-down) must be fewer than the {steps} of '
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
  """Whether the path of each parameter has the regular `expression` in it. Raises ConfigError where none has."""
  paths = flatten(model.shapes()[0])
  try:
    pattern = re.compile(expression)
  except re.error as error:
    raise ConfigError(f'{where}: {expression!r} is not a regular expression ({error}).') from None
  mask = {path: bool(pattern.search(path)) for path in paths}
  if not any(mask.values()):
    raise ConfigError(f'{where}: {expression!r} is found in no parameter path; there are '
                      f'{", ".join(sorted(paths)[:8])}, ...')
  return unflatten(mask)


def decayed_by_default(path: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> bool:
  """Whether this is a kernel or a word embedding, and not a bias, a norm's scale or a learned position.

  The number of dimensions does not tell: a stack of layers or experts makes the bias of one a matrix, and attention
  biases have two dimensions, heads and their width. So these stacking axes are not counted.
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
  """For every leaf of the optimizer's state the sharding of the parameter it mirrors, or `otherwise`.

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
  """`opt_state` whose schedule stands at `step`: the learning rate belongs to the step, whatever was skipped before it.

  What else is counted are updates, as the correction of moments needs.
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
