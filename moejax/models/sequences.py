"""The inputs of language models from a batch."""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.functional import Tree
from moejax.routing.inputs import RouterInputs


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Token sequences, several documents packed in a row.

  Attributes:
    ids: <int32>[B,S].
    segments: <int32>[B,S] document number within the row; 0 is padding.
    positions: <int32>[B,S] position in the document.
    tasks: <int32>[B,S] task or domain of the document, or None.
  """
  ids: jax.Array
  segments: jax.Array
  positions: jax.Array
  tasks: jax.Array | None = None

  @property
  def router_inputs(self) -> RouterInputs:
    """Inputs for routers."""
    rows, length = self.ids.shape
    documents = self.segments + (length + 1) * jnp.arange(rows, dtype=jnp.int32)[:, None]
    before = lambda distance, otherwise: jnp.where(
        self.positions < distance, otherwise, jnp.roll(self.ids, distance, axis=1))
    last = jnp.roll(self.positions, -1, axis=1) == 0
    return RouterInputs(token_ids=self.ids, previous_ids=before(1, otherwise=0),
                        earlier_ids=jnp.stack([before(distance, otherwise=-1) for distance in (1, 2, 3, 4)], axis=-1),
                        next_ids=jnp.where(last, 0, jnp.roll(self.ids, -1, axis=1)), valid=self.segments > 0,
                        positions=self.positions, documents=documents, tasks=self.tasks)


def read(batch: Tree, prefix: str = '') -> Tokens:
  """`batch[prefix + 'tokens' | 'segments' | 'positions' | 'tasks']`; without segments each row is one document.

  Raises:
    ConfigError: the batch has no such tokens.
  """
  if f'{prefix}tokens' not in batch:
    raise ConfigError(f"config.model: the model needs '{prefix}tokens', but batches of config.data have "
                      f"{', '.join(map(repr, sorted(batch)))}. Choose data for the model.")
  ids = batch[f'{prefix}tokens']
  whole, start = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
  return Tokens(ids, batch.get(f'{prefix}segments', whole), batch.get(f'{prefix}positions', start),
                batch.get(f'{prefix}tasks'))
