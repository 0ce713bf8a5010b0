"""The n best experts, those after the first by a policy with a threshold per rank (Mesh TensorFlow, st-moe-pytorch)."""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.config import ConfigError
from moejax.ranges import NonNegative
from moejax.routing.logits import normalized
from moejax.routing.plans import Plan
from moejax.routing.select.top_k import TopK
from moejax.routing.stages import SELECTIONS, Scores, required

Policy = Literal['all', 'none', 'threshold', 'random']
PolicyGate = Literal['renormalized', 'probability']


def further_choices(gates: Float32[Array, 'G S K'], policy: Policy, thresholds: tuple[float, ...],
                    key: jax.Array | None) -> Bool[Array, 'G S K']:
  """The choices of a token that are kept; the first always is (Mesh TensorFlow; st-moe-pytorch for more than two).

  Args:
    gates: <float32>[G,S,K] of the chosen experts, best first.
    policy: for the choices after the first: 'all'; 'none'; 'threshold': gates above their threshold; 'random': with
      probability min(1, gate / threshold).
    thresholds: K - 1 floats, from the second choice on.
    key: for 'random'.

  Returns:
    <bool>[G,S,K].
  """
  first, further = jnp.ones(gates[..., :1].shape, bool), gates[..., 1:]
  least = jnp.asarray(thresholds, jnp.float32)
  match policy:
    case 'all':
      counts = jnp.ones(further.shape, bool)
    case 'none':
      counts = jnp.zeros(further.shape, bool)
    case 'threshold':
      counts = further > least
    case 'random':
      counts = jax.random.uniform(required(key, 'policy "random"'), further.shape) * least < further
  return jnp.concatenate([first, counts], axis=-1)


@SELECTIONS('thresholded_top_k')
@dataclasses.dataclass(frozen=True)
class ThresholdedTopK(TopK):
  """The `k` best experts, with those after the first kept by a policy: see `further_choices`.

  Config besides `k`:
    policy, eval_policy: in training and at evaluation; evaluation draws the same numbers in every call.
    threshold: one for all choices after the first, or one for each of the k - 1.
    gate: compared with the threshold: probabilities 'renormalized' over the k, or unchanged ('probability': fairseq).
  """
  policy: Policy = 'random'
  eval_policy: Policy = 'random'
  threshold: NonNegative | tuple[NonNegative, ...] = 0.2
  gate: PolicyGate = 'renormalized'

  def __post_init__(self):
    super().__post_init__()
    if len(self._thresholds()) != self.k - 1:
      raise ConfigError(f'.threshold has {len(self._thresholds())} values for {self.k - 1} choices after '
                        'the first: give one for each, or a single float.')

  def _thresholds(self) -> tuple[float, ...]:
    return (self.threshold,) * (self.k - 1) if isinstance(self.threshold, (int, float)) else tuple(self.threshold)

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    policy = self.policy if train else self.eval_policy
    if policy == 'random':
      key = required(key, 'select "thresholded_top_k" with policy="random"') if train else jax.random.key(0)
    plan = super().__call__(scores, valid, key=key, train=train)
    gates = plan.pick(jax.nn.softmax(scores.logits, axis=-1))
    gates = normalized(gates) if self.gate == 'renormalized' else gates
    counts = further_choices(jax.lax.stop_gradient(gates), policy, self._thresholds(), key)
    return dataclasses.replace(plan, kept=plan.kept & counts)
