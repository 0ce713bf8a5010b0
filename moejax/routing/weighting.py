"""Weighting: the combine weights of the selected experts.

Codebases disagree above all on renormalisation: if the second of two experts (p1, p2) is dropped, the weight of the
first is p1 (`renormalize='never'`: Switch, V-MoE, flaxformer), p1/(p1+p2) ('before': GShard, Mesh TensorFlow) or 1
('after': DeepSpeed, fairseq). Gates are normalised in the log domain, because all gates of a token may be tiny.
"""
import dataclasses
from typing import Literal

import jax

from moejax.config import ConfigError, Registry
from moejax.routing.plans import Plan
from moejax.routing.shares import normalized, softmax_over

Renormalize = Literal['never', 'before', 'after']


def softmax_over_experts(logits: jax.Array) -> jax.Array:
  """Softmax over all destinations of a token: over E, or jointly over E and C.

  Args:
    logits: <float32>[G,S,E] or [G,S,E,C].

  Returns:
    <float32> of the same shape.
  """
  return jax.nn.softmax(logits, axis=tuple(range(2, logits.ndim)))


def router_probs(gates: jax.Array) -> jax.Array:
  """A distribution over experts per token: the gates divided by their sum, after adding up an expert's slots.

  Args:
    gates: <float32>[G,S,E] or [G,S,E,C], non-negative.

  Returns:
    <float32>[G,S,E] summing to 1 over E.
  """
  gates = gates.sum(-1) if gates.ndim == 4 else gates
  return normalized(gates)


class Weighting:
  """Base class of weightings. By default gates are a softmax, and weights do not change when choices are dropped."""

  def gates(self, logits: jax.Array) -> jax.Array:
    """<float32>[G,S,E,..] a value per expert, before any normalisation over the selected ones."""
    return softmax_over_experts(logits)

  def probs(self, logits: jax.Array) -> jax.Array:
    """<float32>[G,S,E] the gates as a distribution over experts."""
    return router_probs(self.gates(logits))

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    """`plan` with the weights of the selection, before choices are dropped."""
    raise NotImplementedError

  def after_drops(self, plan: Plan, logits: jax.Array) -> Plan:
    """`plan` with its final weights, after choices are dropped."""
    return plan

  @property
  def always_one(self) -> bool:
    """Whether weights are always 1 by normalisation, which leaves the router without a gradient from the output."""
    return False


WEIGHTINGS = Registry('router weighting', Weighting, context=('num_experts', 'k'))


@dataclasses.dataclass(frozen=True)
class _OverSelected(Weighting):
  """Base class of weightings that can renormalise over the selected or the kept choices.

  Config:
    renormalize: whether a token's weights are normalised to sum to 1, 'before' or 'after' choices are dropped.
  """
  where: str
  k: int | None
  renormalize: Renormalize = 'never'

  def __post_init__(self):
    if self.k is None and self.renormalize != 'never':
      raise ConfigError(f'{self.where}.renormalize={self.renormalize!r} requires token choice with a fixed number of '
                        "experts. Allowed for this selection: 'never'.")

  def log_gates(self, logits: jax.Array) -> jax.Array:
    """The logarithm of `gates`, up to a constant per token."""
    raise NotImplementedError

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    if self.renormalize == 'before':
      return plan.scale(jax.nn.softmax(plan.pick(self.log_gates(logits)), axis=-1))
    return plan.scale(plan.pick(self.gates(logits)))

  def after_drops(self, plan: Plan, logits: jax.Array) -> Plan:
    if self.renormalize != 'after':
      return plan
    return dataclasses.replace(plan, weight=softmax_over(plan.kept, plan.pick(self.log_gates(logits))))

  @property
  def always_one(self) -> bool:
    return self.k == 1 and self.renormalize != 'never'


@WEIGHTINGS('softmax')
@dataclasses.dataclass(frozen=True)
class Softmax(_OverSelected):
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
      raise ConfigError(f"{self.where}.order='after' requires token choice with a fixed number of experts. "
                        "Allowed for this selection: 'before'.")

  def log_gates(self, logits: jax.Array) -> jax.Array:
    return logits

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    if self.order == 'after':
      return plan.scale(jax.nn.softmax(plan.pick(logits), axis=-1))
    return super().weigh(plan, logits)

  @property
  def always_one(self) -> bool:
    return super().always_one or (self.k == 1 and self.order == 'after')


@WEIGHTINGS('sigmoid')
@dataclasses.dataclass(frozen=True)
class Sigmoid(_OverSelected):
  """Sigmoid gates: experts do not compete for weight (sigma-MoE, loss-free balancing)."""

  def gates(self, logits: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(logits)

  def log_gates(self, logits: jax.Array) -> jax.Array:
    return jax.nn.log_sigmoid(logits)

  def probs(self, logits: jax.Array) -> jax.Array:
    probs = softmax_over_experts(self.log_gates(logits))
    return probs.sum(-1) if probs.ndim == 4 else probs


@WEIGHTINGS('one')
@dataclasses.dataclass(frozen=True)
class One(Weighting):
  """Weight one: the router gets no gradient from the output (Hash Layers, THOR)."""

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    return plan
