"""DSelect-k: at most k experts, selected by continuously differentiable codes."""
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from moejax import functional
from moejax.config import ConfigError
from moejax.ranges import Count, NonNegative, Positive
from moejax.routing.balance.selectors import Reduction, reduced
from moejax.routing.logits import vectors
from moejax.routing.papers import paper
from moejax.routing.score.smooth_step import EPSILON, binary_codes, select_by_code, smooth_step
from moejax.routing.stages import BALANCERS, SCORES, Balancer, Routed, Score, Scores

# The input of a gate: the 'example', or only the 'task' (a static gate if there is one task).
Gate = Literal['example', 'task']


@SCORES('dselect_k')
class DSelectK(Score):
  """`q = sum_i softmax_i(w) r_i`, where selector r_i is a product of smooth steps of its code z_i (section 3).

  The shares of the experts; at most k are non-zero once every |z| is gamma/2 or more.

  Config:
    k: number of selectors, which bounds the experts per token.
    gate: 'example': z and w are linear in the features; 'task': z and w are parameters, one set per task, and several
      tasks need features=dict(name='tasks').
    tasks: number of tasks.
    gamma: width of the step.
  """

  gives = ('selectors',)

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, k: Count,
               gate: Gate = 'example', tasks: Count = 1, gamma: Positive = 1.):
    if gate == 'task' and (tasks > 1) != (dim is None):
      raise ConfigError(f".tasks = {tasks}: gate 'task' needs features=dict(name='tasks') for several tasks, "
                        'and vector features for one.')
    if gate == 'example' and tasks > 1:
      raise ConfigError(".tasks is only for gate='task'. Remove it.")
    self.num_experts, self.k, self.gate, self.gamma = num_experts, k, gate, gamma
    self.bits = binary_codes(num_experts).shape[1]

    def parameter(limit, size):
      # The default bound of Keras' `RandomUniform` is 0.05.
      uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
      return functional.parameter(rngs, uniform, size, (None,) * len(size))

    rows = (vectors(dim),) if gate == 'example' else (tasks,)
    self.codes = parameter(gamma / 100, (*rows, k * self.bits))
    self.weights = parameter(0.05, (*rows, k))
    self.codes_bias = parameter(gamma / 100, (k * self.bits,)) if gate == 'example' else None
    self.weights_bias = parameter(0.05, (k,)) if gate == 'example' else None

  def __call__(self, features: Shaped[Array, 'G S ...'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D], or <int32>[G,S] tasks. The logits are q; extras: `selectors` [G,S,K,E]."""
    shape = features.shape[:2]
    if self.gate == 'task':
      rows = features if features.ndim == 2 else jnp.zeros(shape, jnp.int32)
      codes, weights = self.codes[...][rows], self.weights[...][rows]
    else:
      product = lambda kernel: jnp.einsum('gsd,dz->gsz', features, kernel[...], precision=jax.lax.Precision.HIGHEST)
      codes, weights = product(self.codes), product(self.weights)
      if self.codes_bias is not None and self.weights_bias is not None:
        codes, weights = codes + self.codes_bias[...], weights + self.weights_bias[...]
    steps = smooth_step(codes.reshape(*shape, self.k, self.bits), self.gamma)
    selectors = select_by_code(steps, self.num_experts)
    shares = jnp.einsum('gsk,gske->gse', jax.nn.softmax(weights, axis=-1), selectors,
                        precision=jax.lax.Precision.HIGHEST)
    return Scores(logits=shares, select=shares, clean=shares, extras=dict(selectors=selectors))


@BALANCERS('reachable')
class Reachable(Balancer):
  """`sum_i 1 / sum_e r_ie` if E is not a power of two: keeps selectors off codes without an expert (section 3).

  Without it the shares of a token may sum to less than 1. The inner sum is clipped at 1e-6, below which it has no
  gradient. If every code has an expert, the loss is 0.

  Config:
    reduction: over tokens; see `SelectorEntropy`.
  """

  reads = ('selectors',)

  def __init__(self, *, num_experts: int, coefficient: NonNegative, reduction: Reduction = 'mean'):
    self.reduction: Reduction = reduction
    self.coefficient, self.total = coefficient, reduction == 'sum'
    self.all_codes_name_experts = num_experts & (num_experts - 1) == 0

  def loss(self, routed: Routed) -> Float32[Array, '']:
    if self.all_codes_name_experts:
      return jnp.zeros(())
    reached = routed.scores.extras['selectors'].sum(-1)
    return reduced(jnp.sum(1 / jnp.maximum(reached, EPSILON), axis=-1), routed.valid, self.reduction)


@paper('DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning',
       '2106.03760', chooses='soft', exchangeable=False, example=dict(k=2), alone=dict(k=2))
def dselect_k(k: int = 2, gate: Gate = 'example', tasks: int = 1, gamma: float = 1., entropy: float = 1e-6,
              reachable: float = 1.) -> dict[str, Any]:
  """DSelect-k (arXiv 2106.03760).

  Section 3: k selectors over binary codes of the experts, steps of width gamma = 1; all experts are computed in
  training. Initial values, the entropy loss (1e-6, a sum over examples) and, if E is not a power of two, the loss that
  keeps shares on existing experts, as in google-research/dselect_k_moe. `gate='task'` is the static gate.
  """
  reduction = 'sum' if gate == 'example' else 'mean'
  return dict(
      features=dict(name='tasks' if tasks > 1 else 'token'),
      score=dict(name='dselect_k', k=k, gate=gate, tasks=tasks, gamma=gamma),
      select=dict(name='all'),
      weigh=dict(name='as_scored'),
      place=dict(name='dropless'),
      balance=dict(selector_entropy=dict(coefficient=entropy, reduction=reduction),
                   reachable=dict(coefficient=reachable, reduction=reduction)))
