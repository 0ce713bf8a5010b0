"""Which batches are skipped. Oracle: medians by hand and by NumPy in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError, call
from moejax.training.durability import spikes
from moejax.training.durability.recovery import RecoveryConfig
from moejax.training.durability.spikes import WINDOW

SPIKES = RecoveryConfig(skip='spikes', spike=5.0)
judge = jax.jit(lambda skips, loss, norm: spikes.judge(SPIKES, skips, loss, norm))
record = jax.jit(spikes.record)


def filled(losses, norms=None):
  """The statistics after accepted steps with these losses."""
  skips = spikes.initial()
  for loss, norm in zip(losses, norms if norms is not None else np.ones(len(losses))):
    skips = record(skips, True, loss, norm)
  return skips


LOSSES = np.random.default_rng(0).normal(3, 0.1, 100).astype(np.float32)
NORMS = np.random.default_rng(1).lognormal(0, 0.2, 100).astype(np.float32)


def test_the_limit_is_the_median_and_five_robust_deviations_of_the_last_steps():
  last = LOSSES[-WINDOW:].astype(np.float64)
  expected = np.median(last) + 5 * 1.4826 * np.median(np.abs(last - np.median(last)))
  accepted, limits = judge(filled(LOSSES, NORMS), 3.0, 1.0)
  assert accepted
  np.testing.assert_allclose(limits['recovery/loss_limit'], expected, rtol=1e-5)  # float32
  last = np.log(NORMS[-WINDOW:].astype(np.float64))
  expected = np.exp(np.median(last) + 5 * 1.4826 * np.median(np.abs(last - np.median(last))))
  np.testing.assert_allclose(limits['recovery/gradient_norm_limit'], expected, rtol=1e-4)


@pytest.mark.parametrize('loss, norm, accepted', [
    (3.0, 1.0, True), (4.0, 1.0, False), (3.0, 20.0, False), (1.0, 0.01, True),  # below is never a spike
    (np.nan, 1.0, False), (3.0, np.inf, False)])
def test_a_step_far_above_the_last_ones_is_refused(loss, norm, accepted):
  assert judge(filled(LOSSES, NORMS), loss, norm)[0] == accepted


def test_before_the_window_is_full_only_non_finite_values_are_refused():
  skips = filled(LOSSES[:WINDOW - 1])
  assert judge(skips, 100., 100.)[0] and not judge(skips, np.nan, 1.)[0]
  assert not judge(record(skips, True, 3., 1.), 100., 1.)[0]


def test_noise_on_a_flat_curve_is_not_a_spike():
  skips = filled(np.full(WINDOW, 2.0), np.full(WINDOW, 3.0))  # deviation 0: 1% of the median counts, 5 times
  assert judge(skips, 2.0 * 1.04, 3.0)[0] and not judge(skips, 2.0 * 1.06, 3.0)[0]


def test_skipped_batches_are_counted_but_not_recorded():
  before = filled(LOSSES[:5])
  after = record(record(before, False, np.nan, 1.), False, 50., 1.)
  assert (after['skipped'], after['in_a_row'], after['accepted']) == (2, 2, 5)
  np.testing.assert_array_equal(after['losses'], before['losses'])
  assert record(after, True, 3., 1.)['in_a_row'] == 0


def test_by_default_a_spike_is_not_skipped():
  accepted, limits = spikes.judge(RecoveryConfig(), filled(LOSSES), jnp.float32(1e6), jnp.float32(1.))
  assert accepted and limits == {}


@pytest.mark.parametrize('key, value, sentence', [
    ('skip', 'spike', "config.recovery.skip must be one of 'not_finite', 'spikes'"),
    ('patience', 0, 'config.recovery.patience must be an int of at least 1'),
    ('max_rollbacks', -1, 'config.recovery.max_rollbacks must be an int of at least 0'),
    ('spike', 0., 'config.recovery.spike must be a float above 0'), ('collapse', 1.5, 'config.recovery.collapse must be a float above 0 and of at most 1')])
def test_impossible_settings_are_refused(key, value, sentence):
  with pytest.raises(ConfigError, match=sentence):
    call(RecoveryConfig, {key: value}, 'config.recovery')
