"""What attention reads, and what an implementation of it is.

Which keys a query sees is data (`Mask`), which every implementation lowers in its own way.

Axis letters: B batch, S queries, T keys.
"""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.kernels.target import Target

EMPTY = -1  # the position of an empty slot of a cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """A query sees the keys that all of its fields allow; `Mask()` allows all.

  Attributes:
    query_segments, key_segments: <int32>[B,S] and <int32>[B,T]; a query sees keys of its own segment. Padding is segment
      0: it sees only padding, and nothing else sees it. Both or neither.
    query_positions, key_positions: <int32>[B|1,S] and <int32>[B|1,T], places in the row (not in the segment), which
      `causal` and `window` compare; None: 0 to S-1 and 0 to T-1. Given where there is a cache: queries stand at its end,
      the keys of a ring buffer in any order, and a key at a negative position (`EMPTY`) is an empty slot, never seen.
    prefix: <bool>[B,T], True for keys that earlier queries see too, in spite of `causal`: those of the prefix of each
      segment (prefix LM, 1910.10683 figure 4). All but `causal` holds for them. None: no key.
    causal: a query sees no later key.
    window: a query sees keys at distances below this: itself and the window - 1 tokens before it (2310.06825, figure 1),
      and as many after it unless `causal`. None: any distance.
  """
  query_segments: Int[Array, 'B S'] | None = None
  key_segments: Int[Array, 'B T'] | None = None
  query_positions: Int[Array, '#B S'] | None = None
  key_positions: Int[Array, '#B T'] | None = None
  prefix: Bool[Array, 'B T'] | None = None
  causal: bool = dataclasses.field(default=False, metadata=dict(static=True))
  window: int | None = dataclasses.field(default=None, metadata=dict(static=True))

  def __post_init__(self):
    if (self.query_segments is None) != (self.key_segments is None):
      raise ValueError('Mask needs query_segments and key_segments, or neither: a query sees keys of its own segment.')
    if self.prefix is not None and not self.causal:
      raise ValueError('Mask.prefix is seen in spite of `causal`: without it every key is, so leave it out.')
    if self.window is not None and self.window < 1:
      raise ValueError(f'Mask.window = {self.window}: it counts the query itself, so it is at least 1, or None.')

  def with_window(self, window: int | None) -> 'Mask':
    """This mask with another window: the window belongs to a layer, all else to the batch."""
    return dataclasses.replace(self, window=window)

  def map(self, of_queries: Callable[[jax.Array], jax.Array], of_keys: Callable[[jax.Array], jax.Array]) -> 'Mask':
    """This mask with its arrays of queries and those of keys put through a function each."""
    queries, keys = ((lambda x, f=f: None if x is None else f(x)) for f in (of_queries, of_keys))
    return dataclasses.replace(
        self, query_segments=queries(self.query_segments), query_positions=queries(self.query_positions),
        key_segments=keys(self.key_segments), key_positions=keys(self.key_positions), prefix=keys(self.prefix))

  def dense(self, queries: int, keys: int) -> Bool[Array, '#B 1 S T'] | None:
    """<bool>[B|1,1,S,T] for S `queries` and T `keys`, True where a query sees a key; None if all see all."""
    seen = []
    if self.query_segments is not None and self.key_segments is not None:
      seen.append(self.query_segments[:, :, None] == self.key_segments[:, None, :])
    if self.key_positions is not None:
      seen.append(self.key_positions[:, None, :] >= 0)
    if self.causal or self.window is not None:
      query_positions = jnp.arange(queries)[None] if self.query_positions is None else self.query_positions
      key_positions = jnp.arange(keys)[None] if self.key_positions is None else self.key_positions
      distance = query_positions[:, :, None] - key_positions[:, None, :]
      if self.causal:
        seen.append(distance >= 0 if self.prefix is None else (distance >= 0) | self.prefix[:, None, :])
      if self.window is not None:
        seen.append(jnp.abs(distance) < self.window)
    if not seen:
      return None
    mask = seen[0]
    for other in seen[1:]:
      mask = mask & other
    batch = mask.shape[0]
    return jnp.broadcast_to(mask, (batch, queries, keys))[:, None]


class AttentionInputs(NamedTuple):
  """What `attend` computes from; the same shapes and meanings as its arguments."""
  queries: Float[Array, 'B S H k']
  keys: Float[Array, 'B T N k']
  values: Float[Array, 'B T N v']
  scale: float
  mask: Mask | None = None
  bias: Float[Array, '#B #H S T'] | None = None
  sinks: Float[Array, 'H'] | None = None
  cap: float | None = None
  drop: Callable[[jax.Array], jax.Array] | None = None


DROPS = "dropout of attention's weights needs all of them: use 'plain', or set dropout to 0."


class AttentionKernel(NamedTuple):
  """One way to compute attention, forward and backward.

  Attributes:
    run: -> <float>[B,S,H,v] of the dtype of the values.
    limit: one sentence on why the target cannot run the inputs, of which it reads no values; None if it can.
  """
  run: Callable[[AttentionInputs], jax.Array]
  limit: Callable[[Target, AttentionInputs], str | None] = lambda target, inputs: None
