"""A learned embedding of the document's task."""
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from moejax import functional
from moejax.ranges import Count
from moejax.routing.inputs import RouterInputs
from moejax.routing.stages import FEATURES, Feature


@FEATURES('task')
class TaskEmbedding(Feature):
  """A learned embedding per task, shared by all tokens of a document (Beyond Distillation, section 3.2).

  Config:
    num_tasks: task ids must be below it; others get NaN, so that the mistake shows.
    width: width of the embeddings; None: the model's.
    trainable: whether the embeddings are learned, or keep their initial values.
  """

  def __init__(self, *, dim: int, rngs: nnx.Rngs, num_tasks: Count, width: Count | None = None, trainable: bool = True):
    self.width = width or dim
    self.trainable = trainable
    self.embedding = functional.parameter(rngs, nnx.initializers.normal(1.), (num_tasks, self.width), (None, None))

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Float32[Array, 'G S width']:
    """-> <float32>[G,S,width]. Raises ConfigError if the batch has no tasks."""
    embedding = self.embedding[...] if self.trainable else jax.lax.stop_gradient(self.embedding[...])
    return embedding.at[inputs['tasks']].get(mode='fill', fill_value=jnp.nan)


@FEATURES('token_and_task')
class TokenAndTask(TaskEmbedding):
  """The activations, concatenated with the embedding of the task (task-aware gates, 2204.07689)."""

  def __init__(self, *, dim: int, rngs: nnx.Rngs, num_tasks: Count, width: Count | None = None):
    super().__init__(dim=dim, rngs=rngs, num_tasks=num_tasks, width=width)
    self.width = dim + (width or dim)

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Float32[Array, 'G S width']:
    """`x`: <float>[G,S,D] -> <float32>[G,S,D+width]."""
    return jnp.concatenate([x.astype(jnp.float32), super().__call__(x, inputs)], axis=-1)
