"""Dropout, and stochastic depth, which is dropout of a residual branch as a whole."""
import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float | jax.Array, *, key: jax.Array | None, train: bool,
            shared_axes: tuple[int, ...] = ()) -> jax.Array:
  """`x` with entries zeroed with probability `rate` and the others divided by `1 - rate`; `x` itself outside training.

  Entries along `shared_axes` are dropped together: `dropout(branch, rate, shared_axes=(1, 2))` on `[B,S,D]` is
  stochastic depth (1603.09382). `rate` may be traced, as it is when it grows with the depth of a scanned layer.

  Raises:
    ValueError: in training without a key.
  """
  if not train or (isinstance(rate, (int, float)) and rate == 0):
    return x
  if key is None:
    raise ValueError('dropout in training needs a key: pass key= to the model.')
  shape = [1 if axis in shared_axes else size for axis, size in enumerate(x.shape)]
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
