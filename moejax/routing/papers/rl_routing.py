"""RL-R: routing as a policy, learned with REINFORCE."""
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.ranges import NonNegative
from moejax.routing.logits import vectors
from moejax.routing.papers import paper
from moejax.routing.score.linear import LinearScore
from moejax.routing.stages import SCORES, Scores


@SCORES('policy')
class Policy(LinearScore):
  """A linear score, and a linear baseline of the reward: `Scores.extras['value']` <float32>[G,S].

  The baseline has no gradient to the activations.
  """

  gives = ('value',)

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, init_std: NonNegative = 0.02):
    super().__init__(dim=dim, num_experts=num_experts, rngs=rngs, init_std=init_std)
    zeros = nnx.initializers.zeros
    self.value = functional.parameter(rngs, zeros, (vectors(dim),), ('embed',))
    self.value_bias = functional.parameter(rngs, zeros, (), ())

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]."""
    scores = super().__call__(features, key=key, train=train)
    value = jnp.einsum('gsd,d->gs', jax.lax.stop_gradient(features), self.value[...],
                       precision=jax.lax.Precision.HIGHEST)
    scores.extras['value'] = value + self.value_bias[...]
    return scores


@paper('Unified Scaling Laws for Routed Language Models', '2202.01169', draws=True)
def rl_routing(weight: Literal['probability', 'one'] = 'probability', balance: float = 0.01) -> dict[str, Any]:
  """RL-R of Unified Scaling Laws for Routed Language Models (arXiv 2202.01169), section 3.3.

  The softmax over experts is a policy: training samples one expert per token from it, evaluation takes the best. Its
  reward is the log-probability that the model then gives to the next token, minus a learned baseline:
  `config.method = dict(name='reinforce')`. `weight`: of the sampled expert's output; with 'one' only REINFORCE and the
  balance loss (with coefficient `balance`) train the router.
  """
  return dict(
      score=dict(name='policy', init_std=0.02),
      select=dict(name='sample', k=1),
      weigh=dict(name='softmax', order='before', renormalize='never') if weight == 'probability' else dict(name='one'),
      place=dict(name='dropless'),
      balance=dict(switch=balance) if balance else {})
