"""Which batches are skipped: any whose loss or gradient is not finite or, if configured, a spike; the step also skips
any whose update is not finite.

Everything here happens inside the compiled step, from values that all devices and processes share: nothing waits for
the host, and every process decides alike. The statistics are part of the train state: a run that resumes from a
checkpoint decides as if it had never stopped.
"""
import jax
import jax.numpy as jnp

from moejax.training.durability.recovery import RecoveryConfig

# How many accepted steps a spike is measured against.
WINDOW = 64

Skips = dict[str, jax.Array]


def initial() -> Skips:
  """The statistics before the first step.

  `losses`, `gradient_norms` <float32>[WINDOW] are those of the last accepted steps. Counted are `accepted` steps,
  `skipped` batches, those skipped `in_a_row` since the last accepted step, `rollbacks`, and the steps `lost` to them;
  the last rollback was after step `rolled_back_at`, to the state after step `rolled_back_to`.
  """
  zero = lambda: jnp.zeros((), jnp.int32)
  return dict(losses=jnp.zeros(WINDOW), gradient_norms=jnp.zeros(WINDOW), accepted=zero(), skipped=zero(),
              in_a_row=zero(), rollbacks=zero(), lost=zero(), rolled_back_at=zero(), rolled_back_to=zero())


def judge(config: RecoveryConfig, skips: Skips, loss: jax.Array, gradient_norm: jax.Array) -> tuple[
    jax.Array, dict[str, jax.Array]]:
  """(<bool>[] whether the update is applied, the limits it was compared with, as metrics)."""
  finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
  if config.skip == 'not_finite':
    return finite, {}
  loss_limit = limit(skips['losses'], skips['accepted'], config.spike)
  # Gradient norms vary by factors, not by differences.
  norm_limit = jnp.exp(limit(jnp.log(skips['gradient_norms']), skips['accepted'], config.spike))
  accepted = finite & (loss <= loss_limit) & (gradient_norm <= norm_limit)
  return accepted, {'recovery/loss_limit': loss_limit, 'recovery/gradient_norm_limit': norm_limit}


def limit(recent: jax.Array, accepted: jax.Array, deviations: float) -> jax.Array:
  """<float32>[] median + `deviations` robust standard deviations of `recent` [WINDOW]; infinity until it is full.

  The standard deviation is 1.4826 times the median distance to the median, as for a normal distribution, and at least
  1% of the median, so that noise on a flat curve is not a spike.
  """
  median = jnp.median(recent)
  deviation = jnp.maximum(1.4826 * jnp.median(jnp.abs(recent - median)), 0.01 * jnp.abs(median))
  return jnp.where(accepted >= WINDOW, median + deviations * deviation, jnp.inf)


def record(skips: Skips, accepted: jax.Array, loss: jax.Array, gradient_norm: jax.Array) -> Skips:
  """The statistics after a step."""
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
