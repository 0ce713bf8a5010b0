"""Random keys by name: no module holds random state, and no key is used twice."""
import zlib
from typing import overload

import jax


@overload
def derive(key: jax.Array, name: str | int) -> jax.Array: ...
@overload
def derive(key: jax.Array | None, name: str | int) -> jax.Array | None: ...


def derive(key: jax.Array | None, name: str | int) -> jax.Array | None:
  """The key called `name` under `key`; `None` stays `None` (evaluation uses no randomness).

  The same name under the same key is the same stream, whatever else is derived in between, so that adding a source of
  noise to one module changes no other module's.
  """
  if key is None:
    return None
  return jax.random.fold_in(key, name if isinstance(name, int) else zlib.crc32(name.encode()) & 0x7FFFFFFF)
