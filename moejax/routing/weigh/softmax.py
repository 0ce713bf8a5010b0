"""Softmax weights, and when they are renormalised.

Codebases disagree above all on that: if the second of two experts (p1, p2) is dropped, the weight of the first is p1
(`renormalize='never'`: Switch, V-MoE, flaxformer), p1/(p1+p2) ('before': GShard, Mesh TensorFlow) or 1 ('after':
DeepSpeed, fairseq). Gates are normalised in the log domain, because all gates of a token may be tiny.
"""
import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float32

from moejax.config import ConfigError
from moejax.routing.logits import softmax_over
from moejax.routing.plans import Plan
from moejax.routing.stages import WEIGHTINGS, Renormalize, Weighting


@dataclasses.dataclass(frozen=True)
class OverSelected(Weighting):
  """Base class of weightings that can renormalise over the selected or the kept choices.

  Config:
    renormalize: whether a token's weights are normalised to sum to 1, 'before' or 'after' choices are dropped.
  """
  k: int | None
  renormalize: Renormalize = 'never'

  def __post_init__(self):
    if self.k is None and self.renormalize != 'never':
      raise ConfigError(f'.renormalize={self.renormalize!r} requires token choice with a fixed number of '
                        "experts. Allowed for this selection: 'never'.")

  def log_gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    """The logarithm of `gates`, up to a constant per token."""
    raise NotImplementedError

  def weigh(self, plan: Plan, logits: Float32[Array, 'G S *E']) -> Plan:
    if self.renormalize == 'before':
      return plan.scale(jax.nn.softmax(plan.pick(self.log_gates(logits)), axis=-1))
    return plan.scale(plan.pick(self.gates(logits)))

  def after_drops(self, plan: Any, logits: Float32[Array, 'G S *E']) -> Plan:
    if self.renormalize != 'after':
      return plan
    return dataclasses.replace(plan, weight=softmax_over(plan.kept, plan.pick(self.log_gates(logits))))

  @property
  def always_one(self) -> bool:
    return self.k == 1 and self.renormalize != 'never'


@WEIGHTINGS('softmax')
@dataclasses.dataclass(frozen=True)
class Softmax(OverSelected):
  """Softmax probabilities.

  Config:
    order: 'before' selection: softmax over all experts (Switch, GShard, V-MoE); 'after' selection: softmax over the
      selected only (Shazeer et al., Mixtral), the same as 'before' with renormalize='before'.
    renormalize: normalises the weights of the selected ('before') or of the kept choices ('after') to sum to 1.
  """
  order: Literal['before', 'after'] = 'before'

  def __post_init__(self):
    super().__post_init__()
    if self.k is None and self.order == 'after':
      raise ConfigError(".order='after' requires token choice with a fixed number of experts. "
                        "Allowed for this selection: 'before'.")

  def log_gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    return logits

  def weigh(self, plan: Plan, logits: Float32[Array, 'G S *E']) -> Plan:
    if self.order == 'after':
      return plan.scale(jax.nn.softmax(plan.pick(logits), axis=-1))
    return super().weigh(plan, logits)

  @property
  def always_one(self) -> bool:
    return super().always_one or (self.k == 1 and self.order == 'after')
