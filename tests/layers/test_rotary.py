"""Rotary positions: identities that define them, and scalings of their frequencies worked out by hand."""
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from moejax.config import ConfigError
from moejax.layers.positions import POSITIONS
from moejax.layers.rotary import SCALINGS, rope_frequencies, rotate, yarn_mscale

RNG = np.random.default_rng(0)
X = jnp.float32(RNG.normal(size=(2, 5, 3, 8)))
POSITIONS_OF_X = jnp.asarray([[0, 1, 2, 7, 30]] * 2)


def rope(**config):
  return POSITIONS.build(dict(name='rope', **config), 'config.positions')


def frequencies(width, theta=1e4, **config):
  return SCALINGS.build(config, 'config.scaling').frequencies(theta, width)


def test_at_position_zero_rotation_is_the_identity():
  np.testing.assert_array_equal(rope().rotate(X, jnp.zeros((2, 5), int)), X)


@given(shift=st.integers(1, 500), theta=st.sampled_from([100., 1e4, 1e6]))
def test_shifting_all_positions_changes_no_dot_product(shift, theta):
  positions = jnp.asarray(RNG.integers(0, 50, (2, 5)))
  def products(positions):
    q, k = (rotate(x, positions, rope_frequencies(theta, 8)) for x in (X, X[::-1]))
    return jnp.einsum('bshk,bthk->bhst', q, k)
  # Angles reach 550 radians, whose float32 spacing is 6e-5; products sum 8 terms of size 1.
  np.testing.assert_allclose(products(positions), products(positions + shift), atol=1e-3)


@pytest.mark.parametrize('layout, pairs', [('half', [(0, 4), (1, 5), (2, 6), (3, 7)]),
                                           ('interleaved', [(0, 1), (2, 3), (4, 5), (6, 7)])])
def test_each_pair_turns_by_its_own_angle(layout, pairs):
  # Pair i of a head of 8 turns by position * theta^(-i/4): x_a + j x_b times exp(j angle).
  expected = np.asarray(X, np.float64)
  for i, (a, b) in enumerate(pairs):
    turned = (expected[..., a] + 1j * expected[..., b]) * np.exp(1j * np.asarray(POSITIONS_OF_X)[..., None] * 100**(-i / 4))
    expected[..., a], expected[..., b] = turned.real, turned.imag
  got = rope(theta=100., layout=layout).rotate(X, POSITIONS_OF_X)
  np.testing.assert_allclose(got, expected, atol=1e-5)  # angles up to 30 in float32


def test_a_fraction_rotates_the_first_features_as_if_they_were_the_head():
  part = rope(fraction=0.5).rotate(X, POSITIONS_OF_X)
  np.testing.assert_array_equal(part[..., :4], rope().rotate(X[..., :4], POSITIONS_OF_X))
  np.testing.assert_array_equal(part[..., 4:], X[..., 4:])


@pytest.mark.parametrize('config, message', [
    (dict(), r'must be even, not 7\.'),
    (dict(fraction=0.8), r'must be even, not 5 \(fraction 0.8 of 7\)'),
    (dict(fraction=0.1), r'must be even, not 0 \(fraction 0.1 of 7\)'),
])
def test_features_that_do_not_pair_are_refused(config, message):
  with pytest.raises(ConfigError, match=f'config.positions: .*{message}'):
    rope(**config).rotate(X[..., :7], POSITIONS_OF_X)


def test_linear_scaling_divides_positions():
  got = rope(scaling=dict(name='linear', factor=4.)).rotate(X, 4 * POSITIONS_OF_X)
  np.testing.assert_allclose(got, rope().rotate(X, POSITIONS_OF_X), atol=1e-5)  # angles up to 30 in float32


def test_dynamic_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_stretch():
  config = dict(name='dynamic_ntk', factor=2., original_length=2048)
  unscaled = 1e4 ** -(np.arange(8) / 8)
  np.testing.assert_allclose(frequencies(16, length=2048, **config), unscaled)
  np.testing.assert_allclose(frequencies(16, length=500, **config), unscaled)
  ratio = unscaled / frequencies(16, length=8192, **config)
  # The stretch is 2 * 8192/2048 - 1 = 7, and pair i gets its power i/7.
  np.testing.assert_allclose(ratio, 7 ** (np.arange(8) / 7))
  np.testing.assert_array_equal(frequencies(16, **config), frequencies(16, length=4096, **config))


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_ramps_between():
  # With theta = e^4 and 8 features, pair i has frequency e^-i and turns 126 e^-i / 2 pi times in 126 positions: 7 times
  # between pairs 1 and 2, once at 2.998. Whole pairs: the ramp is from 1 to 3.
  config = dict(name='yarn', factor=10., original_length=126, beta_fast=7.)
  np.testing.assert_allclose(frequencies(8, math.exp(4), **config), np.exp([0, -1, -2, -3]) * [1, 1, 0.55, 0.1])
  first, last = math.log(126 / (14 * math.pi)), math.log(126 / (2 * math.pi))
  slowed = (2 - first) / (last - first)
  np.testing.assert_allclose(frequencies(8, math.exp(4), truncate=False, **config)[2],
                             math.exp(-2) * (1 - slowed + slowed / 10))


def test_yarn_lengthens_queries_and_keys_by_the_logarithm_of_the_factor():
  amplitude = lambda **config: SCALINGS.build(dict(name='yarn', original_length=4096, **config), 'scaling').amplitude
  assert amplitude(factor=math.exp(5)) == pytest.approx(1.5)
  assert amplitude(factor=40., mscale=0.7, mscale_all_dim=0.7) == 1
  assert amplitude(factor=40., mscale=1., mscale_all_dim=0.5) == yarn_mscale(40.) / yarn_mscale(40., 0.5)
  assert amplitude(factor=40., attention_factor=1.25) == 1.25
  assert yarn_mscale(1.) == 1 and yarn_mscale(math.exp(10), 0.5) == pytest.approx(1.5)
  scaled = rope(scaling=dict(name='yarn', factor=40., original_length=4096, attention_factor=3.), fraction=0.5)
  start = scaled.rotate(X, jnp.zeros((2, 5), int))
  np.testing.assert_array_equal(start[..., :4], 3 * X[..., :4])
  np.testing.assert_array_equal(start[..., 4:], X[..., 4:])


def test_llama3_ramps_between_turning_once_and_four_times():
  # Pairs of 4 features with frequencies 1 and 1/sqrt(theta): theta puts the second at a number of turns.
  for turns, divisor in [(5, 1), (2.5, 1 / (0.5 / 8 + 0.5)), (0.5, 8)]:
    slow = turns * 2 * math.pi / 8192
    got = frequencies(4, slow**-2, name='llama3', factor=8., original_length=8192)
    np.testing.assert_allclose(got, [1, slow / divisor])


def test_longrope_divides_each_pair_by_the_factor_of_its_length():
  config = dict(name='longrope', factor=32., original_length=4096, short_factor=[1., 2.], long_factor=[4., 8.])
  unscaled = np.asarray([1, 0.01])
  np.testing.assert_allclose(frequencies(4, length=4096, **config), unscaled / [1, 2])
  np.testing.assert_allclose(frequencies(4, length=4097, **config), unscaled / [4, 8])
  np.testing.assert_allclose(frequencies(4, **config), unscaled / [4, 8])
  # 32 = 2^5 and 4096 = 2^12.
  assert SCALINGS.build(config, 'scaling').amplitude == pytest.approx(math.sqrt(1 + 5 / 12))


@pytest.mark.parametrize('config, message', [
    (dict(theta=1., scaling=dict(name='linear', factor=2.)), 'theta = 1 gives all pairs one frequency'),
    (dict(scaling=dict(name='linear', factor=0.5)), 'scaling.factor must be a float of at least 1'),
    (dict(scaling=dict(name='ntk', factor=2.)), "no rope scaling 'ntk'"),
    (dict(scaling=dict(name='llama3', factor=8., original_length=8, high_freq_factor=1.)), 'scaling.high_freq_factor = 1.0'),
    (dict(scaling=dict(name='longrope', factor=2., original_length=8, short_factor=[1.], long_factor=[1.])),
     r'scaling.long_factor has 1 divisors for 4 pairs of the 8 rotated'),
    (dict(fraction=0.25, scaling=dict(name='dynamic_ntk', factor=2., original_length=8)), 'at least 4 rotated'),
    (dict(layout='pairs'), "layout must be one of 'half', 'interleaved'"),
])
def test_configs_that_cannot_rotate_are_refused(config, message):
  with pytest.raises(ConfigError, match=message):
    rope(**config).rotate(X, POSITIONS_OF_X)
