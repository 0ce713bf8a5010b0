"""A capacity that every document has of its own, so that packing changes nothing of what is routed."""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing.placement import PLACEMENTS, Capacity
from moejax.routing.plans import TokenPlan
from moejax.routing.task_features import document_numbers


@PLACEMENTS('document_capacity')
@dataclasses.dataclass(frozen=True)
class DocumentCapacity(Capacity):
  """An expert computes as many choices of a document as its tokens in the group give it slots by the convention.

  So a document is routed as if it were alone in its group. Where 'capacity' keeps buffers of a static size, documents
  of any number have none: the plan says which choices are kept, and no slots (dispatch 'grouped').

  Config: that of 'capacity'.
  """
  by_document: ClassVar[bool] = True

  def __call__(self, plan: TokenPlan, gates: jax.Array, *, key: jax.Array | None, train: bool,
               documents: jax.Array) -> TokenPlan:
    """`documents`: <int32>[G,S], whose tokens follow each other."""
    groups, tokens, _ = plan.expert.shape
    number = document_numbers(documents)
    # An expert has a queue for each document: it is as many experts.
    slot = self.queued(plan.expert + self.num_experts * number[..., None], plan.kept, self.num_experts * tokens, gates,
                       key, train)
    of_length = jnp.asarray(np.array([self.formula(length, train) for length in range(tokens + 1)], np.int32))
    present = plan.kept.any(-1).astype(jnp.int32)
    lengths = jax.vmap(lambda present, number: jax.ops.segment_sum(present, number, tokens))(present, number)
    slots = of_length[jnp.take_along_axis(lengths, number, axis=1)]
    return dataclasses.replace(plan, kept=plan.kept & (slot < slots[..., None]))
