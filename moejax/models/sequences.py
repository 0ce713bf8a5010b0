"""The inputs of language models from a batch."""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.layers.attend import Mask
from moejax.layers.positions import PositionEncoding
from moejax.routing.inputs import RouterInputs


# Number of earlier tokens that routers see (`RouterInputs.earlier_ids`).
_EARLIER = 4
CACHE_AXES = dict(length=('batch',), ids=('batch', None))


@dataclasses.dataclass(frozen=True)
class TokenRows:
  """Token sequences, several documents packed in a row.

  Attributes:
    ids: <int32>[B,S].
    segments: <int32>[B,S] document number within the row; 0 is padding.
    positions: <int32>[B,S] position in the document.
    tasks: <int32>[B,S] task or domain of the document, or None.
    past: what the model remembers of earlier tokens of the rows, as `init_cache` returns it; None: these are all.
  """
  ids: jax.Array
  segments: jax.Array
  positions: jax.Array
  tasks: jax.Array | None = None
  past: Tree | None = None

  @property
  def router_inputs(self) -> RouterInputs:
    """Inputs for routers."""
    rows, length = self.ids.shape
    documents = self.segments + (length + 1) * jnp.arange(rows, dtype=jnp.int32)[:, None]

    def before(distance, otherwise):
      ids = (jnp.roll(self.ids, distance, axis=1) if self.past is None else
             _after(self.past, self.ids)[:, _EARLIER - distance:][:, :length])
      return jnp.where(self.positions < distance, otherwise, ids)
    last = jnp.roll(self.positions, -1, axis=1) == 0
    if self.past is not None:
      last = last.at[:, -1].set(True)
    return RouterInputs(
        token_ids=self.ids, previous_ids=before(1, otherwise=0),
        earlier_ids=jnp.stack([before(distance + 1, otherwise=-1) for distance in range(_EARLIER)], axis=-1),
        next_ids=jnp.where(last, 0, jnp.roll(self.ids, -1, axis=1)), valid=self.segments > 0,
        positions=self.positions, documents=documents, tasks=self.tasks)

  @property
  def places(self) -> jax.Array | None:
    """<int32>[B,S] the number of each token in its row, without padding, where there is a past."""
    if self.past is None:
      return None
    return self.past['length'][:, None] + jnp.cumsum(self.segments > 0, axis=1, dtype=jnp.int32) - 1


def mask(tokens: TokenRows, *, causal: bool) -> Mask:
  """What these tokens see of one another, by their places in the row where there is a past."""
  return Mask(tokens.segments, tokens.segments, query_positions=tokens.places, key_positions=tokens.places,
              causal=causal)


def bias(encoding: PositionEncoding, tokens: TokenRows) -> jax.Array | None:
  """The bias of attention among these tokens; None where there is a past, whose tokens attention knows."""
  length = tokens.ids.shape[1]
  return encoding.bias(length, length) if tokens.past is None else None


def remember(past: Tree, tokens: TokenRows) -> Tree:
  """`past` after these tokens too; padding follows the tokens of a row."""
  count = jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)
  latest = jnp.take_along_axis(_after(past, tokens.ids), count[:, None] + jnp.arange(_EARLIER), axis=1)
  return dict(length=past['length'] + count, ids=latest)


def _after(past: Tree, ids: jax.Array) -> jax.Array:
  return jnp.concatenate([past['ids'], ids], axis=1)


def init_cache(batch: int) -> Tree:
  """What is remembered of B rows without tokens: their lengths, and their latest ids."""
  return dict(length=jnp.zeros(batch, jnp.int32), ids=jnp.zeros((batch, _EARLIER), jnp.int32))


def read(batch: Tree, prefix: str = '', past: Tree | None = None) -> TokenRows:
  """`batch[prefix + 'tokens' | 'segments' | 'positions' | 'tasks']`; without segments each row is one document.

  Args:
    batch: the tokens; with a `past`, those after it.
    prefix: of the names in the batch.
    past: see `TokenRows`.

  Raises:
    ConfigError: the batch has no such tokens.
  """
  if f'{prefix}tokens' not in batch:
    raise ConfigError(f"config.model: the model needs '{prefix}tokens', but batches of config.data have "
                      f"{', '.join(map(repr, sorted(batch)))}. Choose data for the model.")
  ids = batch[f'{prefix}tokens']
  whole, start = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
  if past is not None:
    start = start + past['length'][:, None]
  return TokenRows(ids, batch.get(f'{prefix}segments', whole), batch.get(f'{prefix}positions', start),
                batch.get(f'{prefix}tasks'), past)
