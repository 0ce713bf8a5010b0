"""Fingerprints of arrays, computed where they lie: one int per leaf, changed by any change of one element."""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.parallel import rules


def fingerprint(tree: Any) -> list[int]:
  """One int per leaf, which other contents are very unlikely to share."""
  leaves = jax.tree.leaves(tree)
  if not leaves:
    return []
  if isinstance(leaves[0], np.ndarray):
    return [_of_host(leaf) for leaf in leaves]
  return np.asarray(_fingerprints(_mesh(leaves[0]))(leaves)).tolist()


@functools.cache
def _fingerprints(mesh):
  # Replicated to every process, even where the leaves are sharded.
  return jax.jit(lambda leaves: jnp.stack([_fingerprint(leaf) for leaf in leaves]),
                 out_shardings=None if mesh is None else rules.replicated(mesh))


def _fingerprint(x: jax.Array) -> jax.Array:
  """<uint32>[]: sum of the bits of each element times an odd number that depends on its position, modulo 2**32.

  Integer sums do not depend on order, and so not on sharding; an odd factor is invertible modulo 2**32, so that any
  change of one element changes the sum.
  """
  bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits.astype(jnp.uint32) * (2 * position + 1), dtype=jnp.uint32)


def _of_host(x: np.ndarray) -> int:
  # The same sum without a device, which may not have room for all of `x`.
  bits = x.ravel() if x.dtype == bool else x.ravel().view(f'uint{8 * x.dtype.itemsize}')
  position = np.arange(x.size, dtype=np.uint32)
  return int(np.sum(bits.astype(np.uint32) * (2 * position + 1), dtype=np.uint32))


def _mesh(leaf):
  return getattr(getattr(leaf, 'sharding', None), 'mesh', None)
