"""BASE layers: a balanced assignment of tokens to experts instead of a balance loss."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.ranges import Natural
from moejax.routing.papers import paper
from moejax.routing.plans import Plan
from moejax.routing.select.assignment import TrainedTogether, auction
from moejax.routing.stages import SELECTIONS, Scores


@SELECTIONS('auction')
@dataclasses.dataclass(frozen=True)
class Auction(TrainedTogether):
  """Training: balanced assignment of the group's tokens to experts (`assignment.auction`); evaluation: the best expert.

  A group corresponds to a worker in fairseq, where workers first exchange tokens at random. With the batch as one group
  there is nothing to exchange.

  Config:
    rounds: rounds after which the auction accepts a less optimal assignment.
  """
  rounds: Natural = 100

  k = 1

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    if not train:
      return self.plan(jnp.argmax(scores.select, axis=-1)[..., None], valid)
    assign = jax.vmap(lambda scores, valid: auction(scores, valid, self.rounds))
    return self.plan(assign(jax.lax.stop_gradient(scores.select), valid)[..., None], valid)


@paper('BASE Layers: Simplifying Training of Large, Sparse Models', '2103.16716', chooses='together')
def base(rounds: int = 100) -> dict[str, Any]:
  """BASE Layers (arXiv 2103.16716).

  Section 3.1: in training a linear assignment gives each expert the same number of tokens; equation 2: at evaluation
  each token goes to the expert of highest affinity, without a limit. The output is x + a (F_e(x) - x) with
  a = sigmoid(x.w_e), which is how the centroids w get a gradient, for experts that return F_e(x) - x. Auction and
  centroids as in fairseq.
  """
  return dict(
      score=dict(name='centroids', gain=0.1),
      select=dict(name='auction', rounds=rounds),
      weigh=dict(name='sigmoid', renormalize='never'),
      place=dict(name='dropless'))
