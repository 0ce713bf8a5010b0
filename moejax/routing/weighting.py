"""Weighting: with which weight each selected expert enters a token's output.

Codebases disagree about one thing above all: with one of two experts (p1, p2) dropped, the survivor's weight is p1
(`renormalize='never'`: Switch, V-MoE, flaxformer), p1/(p1+p2) ('before': GShard, Mesh TensorFlow) or 1 ('after':
DeepSpeed, fairseq). Sums of gates are taken of their logarithms: all of a token's gates may be tiny.
"""
import dataclasses
from typing import Literal

import jax

from moejax.config import ConfigError, Registry
from moejax.routing.plans import Plan
from moejax.routing.shares import normalized, softmax_over

WEIGHTINGS = Registry('router weighting')

Renormalize = Literal['never', 'before', 'after']


def softmax_over_experts(logits: jax.Array) -> jax.Array:
  """Softmax over everything that a token can be sent to: E, or jointly E and C.

  Args:
    logits: <float32>[G,S,E] or [G,S,E,C].

  Returns:
    <float32> of the same shape.
  """
  return jax.nn.softmax(logits, axis=tuple(range(2, logits.ndim)))


def router_probs(gates: jax.Array) -> jax.Array:
  """A distribution over experts for every token: the gates over their sum, slots of an expert added up.

  Args:
    gates: <float32>[G,S,E] or [G,S,E,C], not negative.

  Returns:
    <float32>[G,S,E] summing to 1 over E.
  """
  gates = gates.sum(-1) if gates.ndim == 4 else gates
  return normalized(gates)


class Weighting:
  """Base of weightings. Here: gates that are a softmax, and weights that stay when choices are dropped."""

  def gates(self, logits: jax.Array) -> jax.Array:
    """<float32>[G,S,E,..] a value for every expert, before any normalisation over the selected ones."""
    return softmax_over_experts(logits)

  def probs(self, logits: jax.Array) -> jax.Array:
    """<float32>[G,S,E] the gates as a distribution over experts."""
    return router_probs(self.gates(logits))

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    """`plan` with the weights of what was selected, before anything is dropped."""
    raise NotImplementedError

  def after_drops(self, plan: Plan, logits: jax.Array) -> Plan:
    """`plan` with the weights once it is known what is kept."""
    return plan

  @property
  def always_one(self) -> bool:
    """Whether weights are 1 because nothing is left to share with: the router would learn nothing from the output."""
    return False


@dataclasses.dataclass(frozen=True)
class _OverSelected(Weighting):
  """What weightings share whose gates of the selected, or of the kept, may be made to sum to 1.

  Config:
    renormalize: whether the weights of a token are made to sum to 1, 'before' or 'after' choices are dropped.
  """
  where: str
  k: int | None
  renormalize: Renormalize = 'never'

  def __post_init__(self):
    if self.k is None and self.renormalize != 'never':
      raise ConfigError(f'{self.where}.renormalize is {self.renormalize!r}, but the selection gives tokens no fixed '
                        "number of experts. Allowed: 'never'.")

  def log_gates(self, logits: jax.Array) -> jax.Array:
    """The logarithm of `gates`, but for a number that all experts of a token share."""
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
    order: 'before': softmax over all experts, of which the selected are taken (Switch, GShard, V-MoE); 'after': softmax
      over the selected only (Shazeer et al., Mixtral), the same as 'before' with renormalize='before'.
    renormalize: makes the weights of the selected ('before') or of the kept ('after' dropping) sum to 1.
  """
  order: Literal['before', 'after'] = 'before'

  def __post_init__(self):
    super().__post_init__()
    if self.k is None and self.order == 'after':
      raise ConfigError(f"{self.where}.order is 'after', but the selection gives tokens no fixed number of experts. "
                        "Allowed: 'before'.")

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
  """Sigmoids: experts do not compete for weight (sigma-MoE, loss-free balancing)."""

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
  """Weight one: no gradient reaches the router through the output (Hash Layers, THOR)."""

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    return plan
