"""Cross-task skills: each task's route through the layers, learned with Gumbel-softmax."""
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from moejax import functional
from moejax.ranges import Count, NonNegative, Positive
from moejax.routing.logits import vectors
from moejax.routing.papers import paper
from moejax.routing.plans import Plan
from moejax.routing.stages import SCORES, WEIGHTINGS, Score, Scores, Weighting, noiseless, required

# gumbel_softmax_st, gumbel_softmax and softmax in CrossTaskMoE.
Relaxation = Literal['straight_through', 'gumbel', 'softmax']


def temperature(step: Int[Array, ''], start: float, decay: float, end: float) -> Float32[Array, '']:
  """`max(start * exp(-decay * step), end)` (Jang et al. 2017, section 3.1)."""
  return jnp.maximum(start * jnp.exp(-decay * step), end)


@SCORES('task_mlp')
class TaskMLP(Score):
  """`(gelu(t W1 + b1) W2 + b2 + noise) / temperature` of a task embedding t (2205.12701, section 4.2).

  The temperature falls with the training steps, which this module counts; evaluation uses the last temperature and no
  noise. All tokens of a group share the noise; with group='sequence', a group is an example.

  Config:
    hidden: hidden width.
    relaxation: 'softmax' adds no noise; the others add Gumbel noise in training.
    start, decay, end: see `temperature`.
  """

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, hidden: Count = 64,
               relaxation: Relaxation = 'straight_through', start: Positive = 2., decay: NonNegative = 3e-4,
               end: Positive = 0.1):
    dim = vectors(dim)
    self.noise, self.schedule = relaxation != 'softmax', (start, decay, end)
    init, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros
    self.wi = functional.parameter(rngs, init, (dim, hidden), (None, None))
    self.bi = functional.parameter(rngs, zeros, (hidden,), (None,))
    self.wo = functional.parameter(rngs, init, (hidden, num_experts), (None, None))
    self.bo = functional.parameter(rngs, zeros, (num_experts,), (None,))
    self.step = functional.router_state(jnp.zeros((), jnp.int32), ())

  def __call__(self, features: Float32[Array, 'G S width'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,width]."""
    exact = jax.lax.Precision.HIGHEST
    hidden = jax.nn.gelu(jnp.matmul(features, self.wi[...], precision=exact) + self.bi[...], approximate=False)
    logits = jnp.matmul(hidden, self.wo[...], precision=exact) + self.bo[...]
    if train and self.noise:
      noise_shape = (features.shape[0], 1, logits.shape[-1])
      logits += jax.random.gumbel(required(key, 'score "task_mlp" with Gumbel noise'), noise_shape)
    return noiseless(logits / temperature(self.step[...], *self.schedule))

  def update(self) -> dict[str, Any]:
    return {'step': self.step[...] + 1}


def straight_through(logits: Float32[Array, '... E']) -> Float32[Array, '... E']:
  """The one-hot of the argmax, with the gradient of the softmax. `logits`: <float32>[..., E] -> the same shape."""
  soft = jax.nn.softmax(logits, axis=-1)
  hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=soft.dtype)
  return hard + (soft - jax.lax.stop_gradient(soft))


@WEIGHTINGS('straight_through')
class StraightThrough(Weighting):
  """See the function `straight_through`. For select 'all': all experts are computed, so that all get a gradient."""

  def weigh(self, plan: Plan, logits: Float32[Array, '... E']) -> Plan:
    return plan.scale(plan.pick(straight_through(logits)))


@paper('Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts', '2205.12701',
       chooses='fixed', draws=True, example=dict(num_tasks=3, relaxation='gumbel'), alone=dict(num_tasks=3))
def cross_task(num_tasks: int, relaxation: Relaxation = 'straight_through', width: int | None = None, hidden: int = 64,
               start: float = 2., decay: float = 3e-4, end: float = 0.1, trainable: bool = True) -> dict[str, Any]:
  """Eliciting and Understanding Cross-Task Skills with Task-Level MoE (arXiv 2205.12701).

  Section 4: in every layer a two-layer MLP on a task embedding picks one expert with straight-through Gumbel-softmax at
  temperature max(2 exp(-3e-4 step), 0.1); no balance loss. The second training stage is `relaxation='softmax',
  start=300., decay=1e-4, end=1., trainable=False`, which moves from the average of the experts to the learned routes.
  Evaluation is without noise (the published code samples there too).
  """
  weigh = (dict(name='straight_through') if relaxation == 'straight_through' else
           dict(name='softmax', order='before', renormalize='never'))
  return dict(
      features=dict(name='task', num_tasks=num_tasks, width=width, trainable=trainable),
      score=dict(name='task_mlp', hidden=hidden, relaxation=relaxation, start=start, decay=decay, end=end),
      select=dict(name='all'),
      weigh=weigh,
      place=dict(name='dropless'))
