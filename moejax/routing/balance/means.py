"""Means over valid tokens and over groups, and the measure of imbalance."""
import jax
import jax.numpy as jnp

from moejax.routing.shares import scaled


def token_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float>[G,S,...] -> [G,...]: mean over the valid tokens of every group; 0 for a group without valid tokens."""
  valid = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
  return jnp.sum(jnp.where(valid, values, 0), axis=1) / jnp.maximum(valid.sum(1), 1)


def group_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float>[G] -> scalar: mean over the groups with a valid token."""
  some = valid.any(axis=1)
  return jnp.sum(jnp.where(some, values, 0)) / jnp.maximum(some.sum(), 1)


def valid_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float>[G,S] -> scalar: mean over the valid tokens of all groups; 0 where there are none."""
  return jnp.sum(jnp.where(valid, values, 0)) / jnp.maximum(valid.sum(), 1)


def squared_coefficient_of_variation(values: jax.Array) -> jax.Array:
  """Population variance over squared mean of the last axis (as V-MoE and Tensor2Tensor; FastMoE and Tutel use the
  unbiased variance, E/(E-1) times this). 0 where the mean is 0."""
  mean = values.mean(-1)
  return values.var(-1) / jnp.where(mean == 0, 1, mean**2)


def over_tokens(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float32>[G,S,...] -> [G,...]: the sum over the valid tokens of every group; `valid` <bool>[G,S]."""
  return jnp.sum(jnp.where(valid.reshape(*valid.shape, *(1,) * (values.ndim - 2)), values, 0), axis=1)


def imbalance(amounts: jax.Array, valid: jax.Array) -> jax.Array:
  """CV^2 over experts, averaged over groups with a valid token; `amounts` <float32>[G,E], `valid` <bool>[G,S]."""
  # Scaled, because the squares of tiny weights or probabilities would underflow.
  return group_mean(squared_coefficient_of_variation(scaled(amounts)), valid)
