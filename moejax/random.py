"""Random keys by name, and dropout: modules hold no random state, and no key is used twice."""
import zlib
from typing import overload

import jax
import jax.numpy as jnp


@overload
def derive(key: jax.Array, name: str | int) -> jax.Array: ...
@overload
def derive(key: jax.Array | None, name: str | int) -> jax.Array | None: ...


def derive(key: jax.Array | None, name: str | int) -> jax.Array | None:
  """The key called `name` under `key`; `None` stays `None` (evaluation uses no randomness).

  The same name under the same key always gives the same stream, so adding a source of noise to one module does not
  change the noise of any other.
  """
  if key is None:
    return None
  return jax.random.fold_in(key, name if isinstance(name, int) else zlib.crc32(name.encode()) & 0x7FFFFFFF)


def dropout(x: jax.Array, rate: float | jax.Array, *, key: jax.Array | None, train: bool,
            shared_axes: tuple[int, ...] = ()) -> jax.Array:
  """Zeroes entries of `x` with probability `rate` and divides the others by `1 - rate`; the identity outside training.

  Entries along `shared_axes` are dropped together: `dropout(branch, rate, shared_axes=(1, 2))` on `[B,S,D]` is
  stochastic depth (1603.09382). `rate` may be traced, e.g. if it depends on the depth of a scanned layer.

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
