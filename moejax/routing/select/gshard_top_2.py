"""Two experts per token, the second by a policy (GShard)."""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.ranges import NonNegative
from moejax.routing.plans import Leak, Plan, token_plan
from moejax.routing.select.top_k import check_k, top_k
from moejax.routing.stages import SELECTIONS, Scores, Selection, required

SecondExpert = Literal['all', 'sampling', 'random']


def gshard_top_2(scores: Scores, policy: SecondExpert, threshold: float,
          key: jax.Array | None) -> tuple[Int[Array, 'G S 2'], Bool[Array, 'G S 2']]:
  """GShard's choice of two experts (Algorithm 1; names of the policies as in lingvo and Mesh TensorFlow).

  Args:
    scores: with logits <float32>[G,S,E].
    policy: 'all' takes the best two; 'sampling' draws the second from the softmax without the first; 'random' takes
      the second best with probability min(1, g2 / threshold), where g2 = p2 / (p1 + p2).
    threshold: for 'random'.
    key: unused by 'all'.

  Returns:
    expert <int32>[G,S,2] and routed <bool>[G,S,2], False where the second expert was not sampled.
  """
  expert = top_k(scores.select, 2)
  routed = jnp.ones(expert.shape, bool)
  experts = jnp.arange(scores.logits.shape[-1])
  if policy == 'sampling':
    noisy = scores.logits + jax.random.gumbel(required(key, f'policy {policy!r}'), scores.logits.shape)
    second = jnp.argmax(jnp.where(experts == expert[..., :1], -jnp.inf, noisy), axis=-1)
    expert = expert.at[..., 1].set(second.astype(jnp.int32))
  if policy == 'random':
    logits = jnp.sum(jnp.where(expert[..., None] == experts, scores.logits[..., None, :], 0.), axis=-1)
    second_gate = jax.nn.softmax(logits, axis=-1)[..., 1]
    draw = jax.random.uniform(required(key, f'policy {policy!r}'), second_gate.shape)
    routed = routed.at[..., 1].set(draw * threshold < second_gate)
  return expert, routed


@SELECTIONS('gshard_top_2')
@dataclasses.dataclass(frozen=True)
class GShardTop2(Selection):
  """Two experts per token, the second by a policy: see the function `gshard_top_2`.

  Config:
    second: policy in training.
    eval_second: policy at evaluation ('random' in Mesh TensorFlow), with the same draws in every call.
    threshold: for 'random': 0.5 in GShard, 0.2 in Mesh TensorFlow and ST-MoE.
  """
  num_experts: int
  second: SecondExpert = 'all'
  eval_second: SecondExpert = 'all'
  threshold: NonNegative = 0.5

  k = 2

  def __post_init__(self):
    check_k(2, self.num_experts)

  def leak(self, train: bool) -> Leak:
    return 'causal'

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    policy = self.second if train else self.eval_second
    if policy != 'all':
      key = required(key, f'select "gshard_top_2" with second={policy!r}') if train else jax.random.key(0)
    expert, routed = gshard_top_2(scores, policy, self.threshold, key)
    return token_plan(expert, routed & valid[..., None], self.num_experts)
