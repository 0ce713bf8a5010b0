"""The output of all models."""
import dataclasses

import jax

from moejax.functional import Tree
from moejax.routing.router import RouterOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
  """Everything a model computes; it sows nothing.

  Attributes:
    logits: <float32>[B,num_classes] for a vision model, <float32>[B,S,V] for a language or speech model, <float32>[B,B]
      for every image with every text of the batch.
    features: <float>[B,D] or [B,S,D], the inputs of the linear output head.
    routers: the output of each router by depth ('block_03'), the same whether layers are scanned or not, without its
      updates.
    updates: updates of router state for `functional.merge_updates`, nested by the paths of the functional's state.
    extras: further outputs of specific models, by name.
    cache: what the model remembers after the batch; None if it was given no cache.
  """
  logits: jax.Array
  features: jax.Array
  routers: dict[str, RouterOutput]
  updates: Tree
  extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  cache: Tree | None = None
