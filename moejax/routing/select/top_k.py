"""The k best experts of each token."""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ConfigError
from moejax.ranges import Count
from moejax.routing.plans import Leak, TokenPlan, token_plan
from moejax.routing.stages import SELECTIONS, Scores, Selection, required


def top_k(scores: Float[Array, '... E'], k: int) -> Int[Array, '... k']:
  """Indices of the `k` largest along the last axis, largest first; ties go to the lowest index.

  `jax.lax.top_k` is a custom call that compilers do not partition over leading axes, but a max is. An argmax, whose
  reduction carries two values, is slow on CPUs; hence the max, then the lowest index that attains it.

  Args:
    scores: <float>[..., E], finite.
    k: at most E.

  Returns:
    <int32>[..., k].
  """
  num_experts = scores.shape[-1]
  index = jnp.arange(num_experts)
  chosen = []
  for _ in range(k):
    # "Not less" is also true of NaN, so the index stays in range.
    best = jnp.where(scores < scores.max(-1, keepdims=True), num_experts, index).min(-1)
    chosen.append(best)
    scores = jnp.where(best[..., None] == index, -jnp.inf, scores)
  return jnp.stack(chosen, axis=-1)


def check_k(k: int, num_experts: int) -> None:
  """Raises ConfigError unless a token can choose `k` experts."""
  if k > num_experts:
    raise ConfigError(f': a token cannot choose {k} of {num_experts} experts. '
                      f'Allowed for k: 1 to num_experts ({num_experts}).')


@SELECTIONS('top_k')
@dataclasses.dataclass(frozen=True)
class TopK(Selection):
  """Every token chooses the `k` experts with the highest scores.

  Config:
    k: experts per token.
  """
  num_experts: int
  k: Count

  def __post_init__(self):
    check_k(self.k, self.num_experts)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> TokenPlan:
    expert = top_k(scores.select, self.k)
    return token_plan(expert, valid[..., None], self.num_experts)


@SELECTIONS('sample')
@dataclasses.dataclass(frozen=True)
class Sample(TopK):
  """Training: `k` experts sampled from the softmax without replacement (Switch Transformer, appendix C, for k = 1).

  The weight is still the probability of the sampled expert. Evaluation takes the `k` best.
  """

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> TokenPlan:
    if train:
      noise = jax.random.gumbel(required(key, 'select "sample"'), scores.select.shape)
      scores = dataclasses.replace(scores, select=scores.select + noise)
    return super().__call__(scores, valid, key=key, train=train)
