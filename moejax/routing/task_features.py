"""Features of more than a token: the task that its document is of, and the sentence that it is in."""
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
  """Which document of the batch a token is of."""

  field = 'documents'


@FEATURES('task')
class Task(nnx.Module):
  """A learned vector for every task, so that all tokens of a document have the same (Beyond Distillation, section 3.2).

  Config:
    num_tasks: ids are below it; NaN, so that nothing is learned from them, are the vectors of others.
    width: of the vectors; None: that of the model.
    trainable: whether the vectors are learned, or stay as they are drawn.
  """

  leak: ClassVar[Leak] = 'causal'

  def __init__(self, *, dim: int, rngs: nnx.Rngs, num_tasks: Count, width: Count | None = None, trainable: bool = True):
    self.width = width or dim
    self.trainable = trainable
    self.embedding = functional.parameter(rngs, nnx.initializers.normal(1.), (num_tasks, self.width), (None, None))

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """-> <float32>[G,S,width]. Raises ValueError where the batch has no tasks."""
    embedding = self.embedding[...] if self.trainable else jax.lax.stop_gradient(self.embedding[...])
    return embedding.at[inputs['tasks']].get(mode='fill', fill_value=jnp.nan)


@FEATURES('token_and_task')
class TokenAndTask(Task):
  """The activations, and after them the vector of the task (2204.07689: gates that are aware of the task)."""

  def __init__(self, *, dim: int, rngs: nnx.Rngs, num_tasks: Count, width: Count | None = None):
    super().__init__(dim=dim, rngs=rngs, num_tasks=num_tasks, width=width)
    self.width += dim

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D+width]."""
    return jnp.concatenate([x.astype(jnp.float32), super().__call__(x, inputs)], axis=-1)


@FEATURES('sentence')
class Sentence:
  """The mean over the tokens of the document that are in the group (Beyond Distillation, section 3.2)."""

  leak: ClassVar[Leak] = 'future'

  def __init__(self, *, dim: int):
    self.width = dim

  def __call__(self, x: jax.Array, inputs: RouterInputs) -> jax.Array:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D]. Raises ValueError where the model does not say what documents are."""
    valid = jnp.ones(x.shape[:2], bool) if inputs.valid is None else inputs.valid
    return jax.vmap(document_means)(x.astype(jnp.float32), inputs['documents'], valid)


def document_means(x: jax.Array, documents: jax.Array, valid: jax.Array) -> jax.Array:
  """For every token the mean over the valid tokens of its document; zero where there are none.

  Args:
    x: <float32>[S,D].
    documents: <int32>[S]; a document's tokens follow each other.
    valid: <bool>[S].

  Returns:
    <float32>[S,D].
  """
  number = document_numbers(documents)
  def total(values):
    return jax.ops.segment_sum(jnp.where(valid[:, None], values, 0.), number, len(x), indices_are_sorted=True)
  return (total(x) / jnp.maximum(total(jnp.ones((len(x), 1))), 1))[number]


def document_numbers(documents: jax.Array) -> jax.Array:
  """<int32>[..., S] ids of documents whose tokens follow each other -> 0, 1, ... in their order."""
  begins = documents[..., 1:] != documents[..., :-1]
  return jnp.cumsum(jnp.pad(begins, [(0, 0)] * (documents.ndim - 1) + [(1, 0)]).astype(jnp.int32), axis=-1)
