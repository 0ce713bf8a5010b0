"""The mean over a document."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import Leak
from moejax.routing.stages import FEATURES, Feature


@FEATURES('sentence')
class Sentence(Feature):
  """The mean over the document's tokens in the group (Beyond Distillation, section 3.2)."""

  def __init__(self, *, dim: int):
    self.width = dim

  def leak(self, train: bool) -> Leak:
    return 'future'

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Float32[Array, 'G S D']:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D]. Raises ConfigError if the model supplies no document ids."""
    valid = jnp.ones(x.shape[:2], bool) if inputs.valid is None else inputs.valid
    return jax.vmap(document_means)(x.astype(jnp.float32), inputs['documents'], valid)


def document_means(x: Float32[Array, 'S D'], documents: Int[Array, 'S'],
                   valid: Bool[Array, 'S']) -> Float32[Array, 'S D']:
  """For every token, the mean over the valid tokens of its document; zero if there are none.

  Args:
    x: <float32>[S,D].
    documents: <int32>[S]; a document's tokens are contiguous.
    valid: <bool>[S].

  Returns:
    <float32>[S,D].
  """
  number = document_numbers(documents)
  def total(values):
    return jax.ops.segment_sum(jnp.where(valid[:, None], values, 0.), number, len(x), indices_are_sorted=True)
  return (total(x) / jnp.maximum(total(jnp.ones((len(x), 1))), 1))[number]


def document_numbers(documents: Int[Array, '... S']) -> Int[Array, '... S']:
  """<int32>[..., S] ids of contiguous documents -> 0, 1, ... in order."""
  begins = documents[..., 1:] != documents[..., :-1]
  return jnp.cumsum(jnp.pad(begins, [(0, 0)] * (documents.ndim - 1) + [(1, 0)]).astype(jnp.int32), axis=-1)
