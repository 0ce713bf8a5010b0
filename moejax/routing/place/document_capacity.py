"""Capacity per document, so that packing does not change routing."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int
import numpy as np

from moejax.routing.features.sentence import document_numbers
from moejax.routing.place.capacity import Capacity
from moejax.routing.plans import TokenPlan
from moejax.routing.stages import PLACEMENTS


@PLACEMENTS('document_capacity')
@dataclasses.dataclass(frozen=True)
class DocumentCapacity(Capacity):
  """Capacity per document: the convention's formula is applied to the document's tokens in the group.

  A document is thus routed as if it were alone in its group. Unlike 'capacity', which has buffers of static size, the
  number of documents varies: the plan has the kept choices but no slots (dispatch 'grouped').

  Config: as for 'capacity'.
  """
  by_document = True

  def __call__(self, plan: TokenPlan, gates: Float32[Array, 'G S K'], *, key: jax.Array | None, train: bool,
               documents: Int[Array, 'G S']) -> TokenPlan:
    """`documents`: <int32>[G,S] ids; the tokens of a document are contiguous."""
    groups, tokens, _ = plan.expert.shape
    number = document_numbers(documents)
    # An expert has one queue per document, as if every (expert, document) were an expert.
    slot = self.queued(plan.expert + self.num_experts * number[..., None], plan.kept, self.num_experts * tokens, gates,
                       key, train)
    of_length = jnp.asarray(np.array([self.formula(length, train) for length in range(tokens + 1)], np.int32))
    present = plan.kept.any(-1).astype(jnp.int32)
    lengths = jax.vmap(lambda present, number: jax.ops.segment_sum(present, number, tokens))(present, number)
    slots = of_length[jnp.take_along_axis(lengths, number, axis=1)]
    return dataclasses.replace(plan, kept=plan.kept & (slot < slots[..., None]))
