"""One expert, and the next best as fallbacks if it is full (no-token-left-behind; Switch Transformer, appendix B)."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.config import ConfigError
from moejax.ranges import Natural
from moejax.routing.plans import Leak, Plan, token_plan
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import SELECTIONS, Scores, Selection


@SELECTIONS('ranked')
@dataclasses.dataclass(frozen=True)
class Ranked(Selection):
  """The best expert of each token, and the next best `alternatives` as fallbacks for place 'retry'.

  Config:
    alternatives: number of fallback experts.
  """
  num_experts: int
  alternatives: Natural = 3

  k = 1

  def __post_init__(self):
    if self.alternatives >= self.num_experts:
      raise ConfigError(f'.alternatives must be between 0 and {self.num_experts - 1}, the number of other '
                        f'experts; not {self.alternatives}.')

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    expert = top_k(scores.select, 1 + self.alternatives)
    kept = valid[..., None] & (jnp.arange(expert.shape[-1]) == 0)
    return token_plan(expert, kept, self.num_experts)
