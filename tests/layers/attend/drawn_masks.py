"""Masks as hypothesis draws them."""
import jax.numpy as jnp
from hypothesis import strategies as st

from moejax.layers.attend import EMPTY, Mask

FIELDS = ('segments', 'positions', 'prefix', 'window', 'causal')


@st.composite
def masks(draw, batch, queries, keys, fields=FIELDS):
  """A mask with any of the `fields`; a query may see no key."""
  ints = lambda size, low, high: jnp.asarray(draw(st.lists(st.lists(
      st.integers(low, high), min_size=size, max_size=size), min_size=batch, max_size=batch)), jnp.int32)
  has = lambda field: field in fields and draw(st.booleans())
  given = {}
  if has('segments'):
    given |= dict(query_segments=ints(queries, 0, 2), key_segments=ints(keys, 0, 2))
  if has('positions'):
    given |= dict(query_positions=ints(queries, 0, 9), key_positions=ints(keys, EMPTY, 9))
  if has('causal'):
    given |= dict(causal=True, prefix=ints(keys, 0, 1) == 1 if has('prefix') else None)
  return Mask(**given, window=draw(st.integers(1, 5)) if has('window') else None)
