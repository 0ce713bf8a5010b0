"""Queries that see no key: a kernel may give them anything, and wrong gradients; plain attention averages all values."""
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.layers.attend.inputs import Mask


def average_where_blind(out: Float[Array, 'B S H v'], values: Float[Array, 'B T N v'],
                        seeing: Bool[Array, '#B S #H']) -> Float[Array, 'B S H v']:
  """The average of all values where a query sees no key, as plain attention gives it; `out` elsewhere.

  out: <float>[B,S,H,v]; values: <float>[B,T,N,v]; seeing: <bool>[B|1,S,H|1], whether a query sees any key.
  """
  average = values.mean(axis=1, dtype=jnp.promote_types(values.dtype, jnp.float32)).astype(out.dtype)
  average = jnp.repeat(average, out.shape[2] // values.shape[2], axis=1)
  return jnp.where(seeing[..., None], out, average[:, None])


def without_blind(out: Float[Array, 'B S H v'], values: Float[Array, 'B T N v'], mask: Mask | None,
                  sinks: Float[Array, 'H'] | None = None) -> Float[Array, 'B S H v']:
  """`out` of a kernel that knows no blind queries, with what plain attention gives them: the average, with sinks 0."""
  length, kv_length = out.shape[1], values.shape[1]
  if mask is None:
    return out
  is_data = any(x is not None for x in (mask.query_segments, mask.query_positions, mask.key_positions))
  if not is_data and (length <= kv_length or mask.window is None):
    return out  # A query sees itself, or the first key.
  dense = mask.dense(length, kv_length)
  if dense is None:
    return out
  seeing = jnp.moveaxis(dense.any(axis=-1), 1, 2)  # Fused by XLA: no mask of S times T is in memory.
  if sinks is not None:
    return jnp.where(seeing[..., None], out, jnp.zeros((), out.dtype))
  return average_where_blind(out, values, seeing)
