"""Ids of tokens, positions, documents and tasks."""
from jaxtyping import Array, Float, Int

from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import Leak
from moejax.routing.stages import FEATURES, Feature


@FEATURES('token_ids')
class TokenIds(Feature):
  """The ids of the input tokens."""

  field = 'token_ids'

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Int[Array, 'G S']:
    """-> <int32>[G,S]. Raises ConfigError if the model supplies no ids."""
    return inputs[self.field]


@FEATURES('previous_ids')
class PreviousIds(TokenIds):
  """The ids of the previous tokens."""

  field = 'previous_ids'


@FEATURES('next_ids')
class NextIds(TokenIds):
  """The ids of the next tokens: an oracle that sees the targets (Hash Layers, section 5)."""

  field = 'next_ids'

  def leak(self, train: bool) -> Leak:
    return 'future'


@FEATURES('positions')
class Positions(TokenIds):
  """The positions of the tokens in their documents."""

  field = 'positions'


@FEATURES('tasks')
class Tasks(TokenIds):
  """The task, domain or language of the tokens' documents."""

  field = 'tasks'


@FEATURES('documents')
class DocumentIds(TokenIds):
  """The document id of each token."""

  field = 'documents'
