"""Optimizers by name.

    config.optimizer = dict(name='adamw', weight_decay=0.1, clip=1.0,
                            schedule=dict(name='cosine', peak=1e-3, warmup=1000))
"""
import dataclasses
from collections.abc import Mapping

import optax

from moejax.config import Registry, call
from moejax.functional import Functional, Tree
from moejax.ranges import Count, NonNegative, Positive, Rate
from moejax.training import normalized_descent
from moejax.training.parameter_masks import decay_mask, matching
from moejax.training.schedules import SCHEDULES, Schedule

OPTIMIZERS = Registry('optimizer', optax.GradientTransformation, context=('schedule', 'mask', 'axes'))


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
