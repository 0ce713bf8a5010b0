"""Schedules of the learning rate: warm up linearly from 0 to `peak`, then ..."""
import jax.numpy as jnp
import optax

from moejax.config import ConfigError, Registry
from moejax.ranges import Natural, NonNegative, Positive

Schedule = optax.Schedule

SCHEDULES: Registry[Schedule] = Registry('schedule', Schedule, context=('steps',))


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
