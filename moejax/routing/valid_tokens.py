"""Padding counts for nothing: activations without it, and sums and means over valid tokens."""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Num


def without_padding(x: Float[Array, 'G S *D'], valid: Bool[Array, 'G S'] | None) -> Float[Array, 'G S *D']:
  """`x` <float>[G,S,..] with zeros where not `valid` <bool>[G,S]; unchanged if `valid` is None.

  Padding may hold anything: an infinity times a weight of zero is NaN, forward and backward.
  """
  if valid is None:
    return x
  return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)


def valid_mean(values: Num[Array, 'G S'], valid: Bool[Array, 'G S']) -> Float[Array, '']:
  """<float>[G,S] -> scalar: mean over the valid tokens of all groups; 0 where there are none."""
  return jnp.sum(jnp.where(valid, values, 0)) / jnp.maximum(valid.sum(), 1)


def token_mean(values: Float[Array, 'G S *E'], valid: Bool[Array, 'G S']) -> Float[Array, 'G *E']:
  """<float>[G,S,...] -> [G,...]: mean over the valid tokens of every group; 0 for a group without valid tokens."""
  valid = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
  return jnp.sum(jnp.where(valid, values, 0), axis=1) / jnp.maximum(valid.sum(1), 1)


def group_mean(values: Float[Array, 'G'], valid: Bool[Array, 'G S']) -> Float[Array, '']:
  """<float>[G] -> scalar: mean over the groups with a valid token."""
  some = valid.any(axis=1)
  return jnp.sum(jnp.where(some, values, 0)) / jnp.maximum(some.sum(), 1)


def over_tokens(values: Float32[Array, 'G S *E'], valid: Bool[Array, 'G S']) -> Float32[Array, 'G *E']:
  """<float32>[G,S,...] -> [G,...]: the sum over the valid tokens of every group; `valid` <bool>[G,S]."""
  return jnp.sum(jnp.where(valid.reshape(*valid.shape, *(1,) * (values.ndim - 2)), values, 0), axis=1)
