"""Schedules go through points computed by hand."""
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.training.schedules import SCHEDULES

# Peak 0.8 after 10 warm-up steps of 110: half-way of the rest is step 60, three quarters step 85.
POINTS = [
    (dict(name='constant', peak=0.8, warmup=10), {0: 0., 5: 0.4, 10: 0.8, 60: 0.8, 110: 0.8}),
    (dict(name='linear', peak=0.8, warmup=10), {0: 0., 10: 0.8, 60: 0.4, 85: 0.2, 110: 0.}),
    (dict(name='linear', peak=0.8, warmup=10, end=0.4), {10: 0.8, 60: 0.6, 85: 0.5, 110: 0.4, 500: 0.4}),
    # cosine: (1 + cos(pi/2)) / 2 = 1/2, (1 + cos(3 pi/4)) / 2 = (1 - 1/sqrt 2) / 2
    (dict(name='cosine', peak=0.8, warmup=10), {5: 0.4, 10: 0.8, 60: 0.4, 85: 0.4 * (1 - 0.5**0.5), 110: 0., 500: 0.}),
    (dict(name='cosine', peak=0.8, end=0.2), {0: 0.8, 55: 0.5, 110: 0.2}),
    # rsqrt: step 40 is four times the warm-up, so half the peak; step 90 a third
    (dict(name='rsqrt', peak=0.8, warmup=10), {5: 0.4, 10: 0.8, 40: 0.4, 90: 0.8 / 3}),
    # without warm-up 1 / sqrt(step), from step 1 on
    (dict(name='rsqrt', peak=0.8, warmup=0), {0: 0.8, 1: 0.8, 4: 0.4, 16: 0.2, 100: 0.08}),
    # with 20 steps of cool-down, step 100 has half of peak / sqrt(10)
    (dict(name='rsqrt', peak=0.8, warmup=10, cooldown=20), {40: 0.4, 90: 0.8 / 3, 100: 0.4 / 10**0.5, 110: 0.}),
]


@pytest.mark.parametrize('config, points', POINTS)
def test_schedules_pass_through_points_computed_by_hand(config, points):
  schedule = SCHEDULES.build(config, 'config.optimizer.schedule', steps=110)
  found = schedule(jnp.array(list(points)))
  np.testing.assert_allclose(found, list(points.values()), rtol=1e-6, atol=1e-8)  # float32
