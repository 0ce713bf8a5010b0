"""What a router reads besides the activations."""
import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ConfigError

_IDS = 'Language models have them: use one'
_GIVEN_BY = dict(
    token_ids=_IDS, previous_ids=_IDS, earlier_ids=_IDS, next_ids=_IDS, documents=_IDS, valid='Use batches with a mask',
    positions='Models of sequences and of patches have them: use one',
    tasks='Use a language model, and data with the task or domain of each document',
    modalities="Use config.model 'two_modalities'", shared='Use a model with a network that all routers share (speech)')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterInputs:
  """Router inputs besides the activations. Absent fields are None.

  Attributes:
    token_ids: <int32>[G,S] ids of the input tokens.
    previous_ids: <int32>[G,S] id of the previous token of the same document; 0 at its start.
    earlier_ids: <int32>[G,S,4] ids of the four previous tokens of the same document, nearest first; -1 before its
      start.
    next_ids: <int32>[G,S] ids of the next tokens: the targets of a language model.
    valid: <bool>[G,S] False for padding: it is not dispatched, takes no capacity and counts in no loss.
    positions: <int32>[G,S] position of the token in its document.
    documents: <int32>[G,S] document id within the batch.
    tasks: <int32>[G,S] task, domain or language of the token's document.
    modalities: <int32>[G,S] 0 for images, 1 for text.
    shared: <float>[G,S,De] output of an embedding network shared by the routers of all layers.
  """
  token_ids: Int[Array, 'G S'] | None = None
  previous_ids: Int[Array, 'G S'] | None = None
  earlier_ids: Int[Array, 'G S 4'] | None = None
  next_ids: Int[Array, 'G S'] | None = None
  valid: Bool[Array, 'G S'] | None = None
  positions: Int[Array, 'G S'] | None = None
  documents: Int[Array, 'G S'] | None = None
  tasks: Int[Array, 'G S'] | None = None
  modalities: Int[Array, 'G S'] | None = None
  shared: Float[Array, 'G S De'] | None = None

  def __getitem__(self, name: str) -> jax.Array:
    """The field `name`. Raises ConfigError, while tracing, if the model does not supply it."""
    value = getattr(self, name)
    if value is None:
      raise ConfigError(f' needs {name.replace("_", " ")}, but the model does not supply them '
                        f'(RouterInputs.{name} is None). {_GIVEN_BY[name]}, or choose another router.')
    return value
