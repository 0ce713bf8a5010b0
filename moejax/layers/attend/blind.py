"""What a query gets that sees no key."""
import jax
import jax.numpy as jnp


def average_where_blind(out: jax.Array, values: jax.Array, seeing: jax.Array) -> jax.Array:
  """The average of all values where a query sees no key, as plain attention gives it; `out` elsewhere.

  out: <float>[B,S,H,v]; values: <float>[B,T,N,v]; seeing: <bool>[B|1,S], whether a query sees any key.
  """
  average = values.mean(axis=1, dtype=jnp.promote_types(values.dtype, jnp.float32)).astype(out.dtype)
  average = jnp.repeat(average, out.shape[2] // values.shape[2], axis=1)
  return jnp.where(seeing[:, :, None, None], out, average[:, None])
