"""Which batches are skipped: those whose loss or gradient is not finite or, if asked for, spikes; the step adds those
whose update is not finite.

Everything here happens inside the compiled step, from values that all devices and processes share: nothing waits for
the host, and every process decides alike. What is remembered is part of the train state: a run that resumes from a
checkpoint decides as if it had never stopped.
"""
import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from moejax.ranges import Above, AtMost, Count, Natural, Positive

# How many accepted steps a spike is measured against.
WINDOW = 64

Skips = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
  """config.recovery.

  Attributes:
    skip: batches whose update is not applied: those with a loss or gradient that is 'not_finite', or also
      'spikes'.
    spike: a loss (or logarithm of the gradient norm) this many standard deviations above its running median is a spike.
    patience: that many skipped batches in a row, and the run rolls back to the last good checkpoint.
    max_rollbacks: when one more is due the run ends.
    slow_data: seconds of waiting for a batch after which that is said.
    data_timeout: seconds of waiting for a batch after which the run ends, saved.
    collapse: share of the tokens that choose one and the same expert from which on a router counts as collapsed.
  """
  skip: Literal['not_finite', 'spikes'] = 'not_finite'
  spike: Positive = 10.0
  patience: Count = 10
  max_rollbacks: Natural = 3
  slow_data: Positive = 30.0
  data_timeout: Positive = 600.0
  collapse: Annotated[float, Above(0), AtMost(1)] = 0.9


def initial() -> Skips:
  """What the state before the first step remembers.

  `losses`, `gradient_norms` <float32>[WINDOW] are those of the last accepted steps, of which there were `accepted`;
  `skipped` counts batches, `in_a_row` those since the last accepted one; `rollbacks` and the steps `lost` by them are
  counted, and the last one was after step `rolled_back_at` to the state after step `rolled_back_to`.
  """
  zero = lambda: jnp.zeros((), jnp.int32)
  return dict(losses=jnp.zeros(WINDOW), gradient_norms=jnp.zeros(WINDOW), accepted=zero(), skipped=zero(),
              in_a_row=zero(), rollbacks=zero(), lost=zero(), rolled_back_at=zero(), rolled_back_to=zero())


def judge(config: RecoveryConfig, skips: Skips, loss: jax.Array, gradient_norm: jax.Array) -> tuple[
    jax.Array, dict[str, jax.Array]]:
  """(<bool>[] whether the update is applied, the limits it was held against as metrics)."""
  finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
  if config.skip == 'not_finite':
    return finite, {}
  loss_limit = limit(skips['losses'], skips['accepted'], config.spike)
  # Gradient norms vary by factors, not by differences.
  norm_limit = jnp.exp(limit(jnp.log(skips['gradient_norms']), skips['accepted'], config.spike))
  accepted = finite & (loss <= loss_limit) & (gradient_norm <= norm_limit)
  return accepted, {'recovery/loss_limit': loss_limit, 'recovery/gradient_norm_limit': norm_limit}


def limit(recent: jax.Array, accepted: jax.Array, deviations: float) -> jax.Array:
  """<float32>[] median + `deviations` robust standard deviations of `recent` [WINDOW]; infinity until that is full.

  The standard deviation is 1.4826 times the median distance to the median, as for a normal distribution, and at least
  1% of the median: a curve that has become flat does not make noise a spike.
  """
  median = jnp.median(recent)
  deviation = jnp.maximum(1.4826 * jnp.median(jnp.abs(recent - median)), 0.01 * jnp.abs(median))
  return jnp.where(accepted >= WINDOW, median + deviations * deviation, jnp.inf)


def record(skips: Skips, accepted: jax.Array, loss: jax.Array, gradient_norm: jax.Array) -> Skips:
  """What is remembered after a step."""
  place = skips['accepted'] % WINDOW
  def remember(recent, value):
    return recent.at[place].set(jnp.where(accepted, value, recent[place]))
  return dict(
      skips,
      losses=remember(skips['losses'], loss),
      gradient_norms=remember(skips['gradient_norms'], gradient_norm),
      accepted=skips['accepted'] + accepted,
      skipped=skips['skipped'] + ~accepted,
      in_a_row=jnp.where(accepted, 0, skips['in_a_row'] + 1))
