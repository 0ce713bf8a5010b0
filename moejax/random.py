"""Random keys by name: modules hold no random state, and no key is used twice."""
import zlib
from typing import overload

import jax


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
