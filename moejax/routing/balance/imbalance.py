"""The measure of imbalance: the squared coefficient of variation over experts."""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.routing.logits import scaled
from moejax.routing.valid_tokens import group_mean


def imbalance(amounts: Float32[Array, 'G E'], valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """CV^2 over experts, averaged over groups with a valid token; `amounts` <float32>[G,E], `valid` <bool>[G,S]."""
  # Scaled, because the squares of tiny weights or probabilities would underflow.
  return group_mean(squared_coefficient_of_variation(scaled(amounts)), valid)


def squared_coefficient_of_variation(values: Float32[Array, '... E']) -> Float32[Array, '...']:
  """Population variance over squared mean of the last axis (as V-MoE and Tensor2Tensor; FastMoE and Tutel use the
  unbiased variance, E/(E-1) times this). 0 where the mean is 0."""
  mean = values.mean(-1)
  return values.var(-1) / jnp.where(mean == 0, 1, mean**2)
