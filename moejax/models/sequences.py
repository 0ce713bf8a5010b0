"""What language models read from a batch."""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.functional import Tree
from moejax.routing.features import RouterInputs


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Token sequences, several documents packed in a row.

  Attributes:
    ids: <int32>[B,S].
    segments: <int32>[B,S] which document of the row; 0 is padding.
    positions: <int32>[B,S] position in the document.
    tasks: <int32>[B,S] task or domain of the document, or None where the data has none.
  """
  ids: jax.Array
  segments: jax.Array
  positions: jax.Array
  tasks: jax.Array | None = None

  @property
  def router_inputs(self) -> RouterInputs:
    """What routers may look at."""
    rows, length = self.ids.shape
    documents = self.segments + (length + 1) * jnp.arange(rows, dtype=jnp.int32)[:, None]
    before, after = (jnp.roll(self.ids, shift, axis=1) for shift in (1, -1))
    last = jnp.roll(self.positions, -1, axis=1) == 0
    return RouterInputs(token_ids=self.ids, previous_ids=jnp.where(self.positions == 0, 0, before),
                        next_ids=jnp.where(last, 0, after), valid=self.segments > 0, positions=self.positions,
                        documents=documents, tasks=self.tasks)


def read(batch: Tree, prefix: str = '') -> Tokens:
  """`batch[prefix + 'tokens' | 'segments' | 'positions' | 'tasks']`; without segments each row is one whole document."""
  ids = batch[f'{prefix}tokens']
  whole, start = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
  return Tokens(ids, batch.get(f'{prefix}segments', whole), batch.get(f'{prefix}positions', start),
                batch.get(f'{prefix}tasks'))
