"""What every model returns."""
import dataclasses

import jax

from moejax.functional import Tree
from moejax.routing.router import RouterOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
  """Everything a model computes; nothing is sown.

  Attributes:
    logits: <float32>[B,num_classes] of a vision model, <float32>[B,S,V] of a language or speech model, <float32>[B,B] of
      every image with every text of the batch.
    features: <float>[B,D] or [B,S,D], what the logits are a linear function of.
    routers: the output of each router by depth ('block_03'), the same whether layers are scanned or not. Their updates
      are moved to:
    updates: what router state becomes, nested by the paths of the functional's state: for `functional.merge_updates`.
    extras: what one kind of model gives besides, by name.
  """
  logits: jax.Array
  features: jax.Array
  routers: dict[str, RouterOutput]
  updates: Tree
  extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
