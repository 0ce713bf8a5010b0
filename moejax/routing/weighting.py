"""Weighting: with which weight each selected expert enters a token's output.

A weighting is a class with

    gates(logits) -> <float32>[G,S,E]    a value for every expert, before any normalisation over the selected ones,
    weigh(plan, logits) -> Plan          the weights of what was selected, before anything is dropped,
    after_drops(plan) -> Plan            the weights once it is known what is kept.

Codebases disagree about one thing above all: with one of two experts (p1, p2) dropped, the survivor's weight is p1
(`renormalize='never'`: Switch, V-MoE, flaxformer), p1/(p1+p2) ('before': GShard, Mesh TensorFlow) or 1 ('after':
DeepSpeed, fairseq).
"""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moejax.config import ConfigError, Registry
from moejax.routing.plans import Plan

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


def normalized(weight: jax.Array) -> jax.Array:
  """`weight` <float32>[..., K] over its sum; zeros where the sum is zero, with zero gradient."""
  total = weight.sum(-1, keepdims=True)
  return weight / jnp.where(total > 0, total, 1.)


@dataclasses.dataclass(frozen=True)
class _Weighting:
  """What weightings share.

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

  def after_drops(self, plan: Plan) -> Plan:
    if self.renormalize != 'after':
      return plan
    return dataclasses.replace(plan, weight=normalized(plan.kept_weight))

  def _before_drops(self, plan: Plan, weight: jax.Array) -> Plan:
    return plan.scale(normalized(weight) if self.renormalize == 'before' else weight)


@WEIGHTINGS('softmax')
@dataclasses.dataclass(frozen=True)
class Softmax(_Weighting):
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

  def gates(self, logits: jax.Array) -> jax.Array:
    return softmax_over_experts(logits)

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    if self.order == 'after':
      return self._before_drops(plan, jax.nn.softmax(plan.pick(logits), axis=-1))
    return self._before_drops(plan, plan.pick(softmax_over_experts(logits)))


@WEIGHTINGS('sigmoid')
@dataclasses.dataclass(frozen=True)
class Sigmoid(_Weighting):
  """Sigmoids: experts do not compete for weight (sigma-MoE, loss-free balancing)."""

  def gates(self, logits: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(logits)

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    return self._before_drops(plan, plan.pick(jax.nn.sigmoid(logits)))


@WEIGHTINGS('one')
@dataclasses.dataclass(frozen=True)
class One:
  """Weight one: no gradient reaches the router through the output (Hash Layers, THOR)."""

  def gates(self, logits: jax.Array) -> jax.Array:
    return softmax_over_experts(logits)

  def weigh(self, plan: Plan, logits: jax.Array) -> Plan:
    return plan

  def after_drops(self, plan: Plan) -> Plan:
    return plan
