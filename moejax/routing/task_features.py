"""Features shared by several tokens: the task of a document, and the mean over a sentence."""
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from moejax import functional
from moejax.ranges import Count
from moejax.routing.features import FEATURES, RouterInputs, TokenIds
from moejax.routing.plans import Leak


@FEATURES('documents')
class Documents(TokenIds):
  """The document id of each token."""

  field = 'documents'


@FEATURES('task')
class Task(nnx.Module):
  """A learned embedding per task, shared by all tokens of a document (Beyond Distillation, section 3.2).

  Config:
    num_tasks: task ids must be below it; others get NaN, so that the mistake shows.
    width: width of the embeddings; None: the model's.
    trainable: whether the embeddings are learned, or keep their initial values.
  """

  leak: ClassVar[Leak] = 'causal'

  def __init__(self, *, dim: int, rngs: nnx.Rngs, num_tasks: Count, width: Count | None = None, trainable: bool = True):
    self.width = width or dim
    self.trainable = trainable
    self.embedding = functional.parameter(rngs, nnx.initializers.normal(1.), (num_tasks, self.width), (None, None))

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """-> <float32>[G,S,width]. Raises ConfigError if the batch has no tasks."""
    embedding = self.embedding[...] if self.trainable else jax.lax.stop_gradient(self.embedding[...])
    return embedding.at[inputs['tasks']].get(mode='fill', fill_value=jnp.nan)


@FEATURES('token_and_task')
class TokenAndTask(Task):
  """The activations, concatenated with the embedding of the task (task-aware gates, 2204.07689)."""

  def __init__(self, *, dim: int, rngs: nnx.Rngs, num_tasks: Count, width: Count | None = None):
    super().__init__(dim=dim, rngs=rngs, num_tasks=num_tasks, width=width)
    self.width += dim

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D+width]."""
    return jnp.concatenate([x.astype(jnp.float32), super().__call__(x, inputs)], axis=-1)


@FEATURES('sentence')
class Sentence:
  """The mean over the document's tokens in the group (Beyond Distillation, section 3.2)."""

  leak: ClassVar[Leak] = 'future'

  def __init__(self, *, dim: int):
    self.width = dim

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D]. Raises ConfigError if the model supplies no document ids."""
    valid = jnp.ones(x.shape[:2], bool) if inputs.valid is None else inputs.valid
    return jax.vmap(document_means)(x.astype(jnp.float32), inputs['documents'], valid)


def document_means(x: jax.Array, documents: jax.Array, valid: jax.Array) -> jax.Array:
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


def document_numbers(documents: jax.Array) -> jax.Array:
  """<int32>[..., S] ids of contiguous documents -> 0, 1, ... in order."""
  begins = documents[..., 1:] != documents[..., :-1]
  return jnp.cumsum(jnp.pad(begins, [(0, 0)] * (documents.ndim - 1) + [(1, 0)]).astype(jnp.int32), axis=-1)
