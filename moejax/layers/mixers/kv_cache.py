"""The keys and values of earlier tokens, for as many as there are slots: all of them, or a ring of the latest.

    {'keys': <float>[B,T,N,k], 'values': <float>[B,T,N,v], 'places': <int32>[B,T], 'segments': <int32>[B,T]}

A token's place is its number in the row, counted over all calls, without padding; its slot is `place % T`. `places` is
`EMPTY` in a slot that holds no token.
"""
import jax.numpy as jnp

from moejax.layers.attend import EMPTY
from moejax.layers.sublayer import Axes, Cache

AXES: Axes = dict(keys=('batch', 'length', 'kv_heads', 'head_dim'), values=('batch', 'length', 'kv_heads', 'head_dim'),
                  places=('batch', 'length'), segments=('batch', 'length'))


def empty(shape: tuple[int, int, int, int], dtype: jnp.dtype) -> Cache:
  """A cache without tokens; `shape` is [B,T,N,k]."""
  return dict(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype),
              places=jnp.full(shape[:2], EMPTY, jnp.int32), segments=jnp.zeros(shape[:2], jnp.int32))


def append(cache: Cache, new: Cache, window: int | None) -> tuple[Cache, Cache]:
  """Adds S tokens to the T slots of `cache`.

  Args:
    cache: of the tokens before.
    new: the same arrays of the new tokens, [B,S,...]. Padding (segment 0) takes no slot.
    window: a token sees as many, itself included; None: all.

  Returns:
    What the new tokens may see, in any order; and the new cache.
  """
  held = new['segments'] > 0
  new = dict(new, places=jnp.where(held, new['places'], EMPTY))
  slots, count = cache['places'].shape[1], held.shape[1]
  # Of more new tokens than slots only the latest stay; a slot beyond the last is none.
  stays = held & (new['places'] > new['places'].max(axis=1, keepdims=True) - slots)
  slot = jnp.where(stays, new['places'] % slots, slots)
  rows = jnp.arange(held.shape[0])[:, None]
  after = {name: old.at[rows, slot].set(new[name].astype(old.dtype), mode='drop') for name, old in cache.items()}
  if window is None or count == 1:
    return after, after
  # An early token of this call may see a token whose slot a later one takes.
  return {name: jnp.concatenate([old, new[name].astype(old.dtype)], axis=1) for name, old in cache.items()}, after
