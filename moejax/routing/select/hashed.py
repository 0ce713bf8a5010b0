"""One expert per hash of the token (MultiHash layers, arXiv 2106.04426)."""
import dataclasses

import jax
from jaxtyping import Array, Bool

from moejax.config import ConfigError
from moejax.ranges import Count
from moejax.routing.plans import Leak, Plan, token_plan
from moejax.routing.stages import SELECTIONS, Scores, Selection


@SELECTIONS('hashed')
@dataclasses.dataclass(frozen=True)
class Hashed(Selection):
  """Choice n of a token is the expert of hash n of score 'hash'; an expert may be chosen twice.

  Config:
    k: N, number of hashes.
  """
  num_experts: int
  k: Count

  reads = ('experts',)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    experts = scores.extras['experts']
    if experts.shape[-1] != self.k:
      raise ConfigError(f".k = {self.k} needs score=dict(name='hash', hashes={self.k}, ...).")
    return token_plan(experts, valid[..., None], self.num_experts)
