"""What language models read from a batch."""
import dataclasses

import jax
import jax.numpy as jnp

from moejax.functional import Tree
from moejax.routing.router import RouterInputs


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Token sequences, several documents packed in a row.

  Attributes:
    ids: <int32>[B,S].
    segments: <int32>[B,S] which document of the row; 0 is padding.
    positions: <int32>[B,S] position in the document.
  """
  ids: jax.Array
  segments: jax.Array
  positions: jax.Array

  @property
  def router_inputs(self) -> RouterInputs:
    """What routers may look at."""
    return RouterInputs(token_ids=self.ids, valid=self.segments > 0, positions=self.positions)


def read(batch: Tree, prefix: str = '') -> Tokens:
  """`batch[prefix + 'tokens' | 'segments' | 'positions']`; without the latter two each row is one whole document."""
  ids = batch[f'{prefix}tokens']
  whole, start = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
  return Tokens(ids, batch.get(f'{prefix}segments', whole), batch.get(f'{prefix}positions', start))
