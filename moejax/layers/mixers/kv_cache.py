"""The keys and values of earlier tokens, for as many as there are slots: all of them, or a ring of the latest.

    {'keys': <float>[B,T,N,k], 'values': <float>[B,T,N,v], 'places': <int32>[B,T], 'segments': <int32>[B,T]}

A token's place is its number in the row, counted over all calls, without padding; its slot is `place % T`. `places` is
`EMPTY` in a slot that holds no token.
"""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.layers.attend import EMPTY, Mask
from moejax.layers.sublayer import Axes, Cache

AXES: Axes = dict(keys=('batch', 'length', 'kv_heads', 'head_dim'), values=('batch', 'length', 'kv_heads', 'head_dim'),
                  places=('batch', 'length'), segments=('batch', 'length'))


def empty(shape: tuple[int, int, int, int], dtype: jnp.dtype) -> Cache:
  """A cache without tokens; `shape` is [B,T,N,k]."""
  return dict(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype),
              places=jnp.full(shape[:2], EMPTY, jnp.int32), segments=jnp.zeros(shape[:2], jnp.int32))


def append(cache: Cache, keys: jax.Array, values: jax.Array,
           mask: Mask) -> tuple[jax.Array, jax.Array, Mask, Cache]:
  """Adds the tokens of a call.

  Args:
    cache: T slots.
    keys, values: <float>[B,S,N,k] of the new tokens.
    mask: of the new tokens among themselves: with `query_segments`, and their places as `query_positions`. Padding
      (segment 0) takes no slot.

  Returns:
    Keys and values that the new tokens may see, with the mask of new tokens against them; and the new cache.
  """
  new = dict(keys=keys, values=values, places=mask.query_positions, segments=mask.query_segments)
  slots, count = cache['places'].shape[1], keys.shape[1]
  # Of more new tokens than slots only the latest stay.
  last = jnp.max(jnp.where(new['segments'] > 0, new['places'], EMPTY), axis=1, keepdims=True)
  stays = (new['segments'] > 0) & (new['places'] > last - slots)
  slot = jnp.where(stays, new['places'] % slots, slots)  # those outside are dropped
  rows = jnp.arange(keys.shape[0])[:, None]
  after = {name: old.at[rows, slot].set(new[name].astype(old.dtype), mode='drop') for name, old in cache.items()}
  if mask.window is None or count == 1:
    seen = after
  else:  # an early token of this call may see a token whose slot a later one takes
    fresh = dict(new, places=jnp.where(new['segments'] > 0, new['places'], EMPTY))
    seen = {name: jnp.concatenate([old, fresh[name].astype(old.dtype)], axis=1) for name, old in cache.items()}
  mask = dataclasses.replace(mask, key_positions=seen['places'], key_segments=seen['segments'])
  return seen['keys'], seen['values'], mask, after
