"""A router is six pure stages: features -> score -> select -> weigh -> place -> balance.

    stage     computes                                folder
    features  the router's inputs                     features/
    score     [.., D] -> logits[G,S,E], and noise     score/
    select    experts per token or tokens per expert  select/
    weigh     combine weights of the selection        weigh/
    place     capacity and priority                   place/
    balance   losses, metrics, state updates          balance/

`stages.py` has their base classes. Each stage is named in the config, so any one can be overridden or swapped for
another paper's; a paper (`papers/`) is a function that returns such a config, beside the stages that it introduces.
"""
import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
from ml_collections import ConfigDict

from moejax.config import ConfigError, at, call, config_path
from moejax.random import derive
from moejax.routing.inputs import RouterInputs
from moejax.routing.plans import DensePlan, Leak, Plan, SoftPlan, most_leaking
from moejax.routing.stages import (BALANCERS, FEATURES, PLACEMENTS, SCORES, SELECTIONS, WEIGHTINGS, Balancer, Feature,
                                   Placement, Routed, Score, Selection, Stage, Weighting)
from moejax.routing.valid_tokens import valid_mean, without_padding

# Stages register themselves.
import moejax.routing.balance
import moejax.routing.features
import moejax.routing.papers
import moejax.routing.place
import moejax.routing.score
import moejax.routing.select
import moejax.routing.weigh  # noqa: F401


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterOutput:
  """Everything a router computes; it sows nothing and has no global state.

  Attributes:
    plan: the plan for dispatch.
    losses: `{name: scalar}` to add to the objective, already multiplied by their coefficients.
    metrics: `{name: array}`; for every router `load` [E] (each expert's share of the choices, before capacity; of the
      weight for dense routing), `dropped` (share of choices not computed; for expert choice, of tokens without an
      expert), `confidence` (largest router probability) and `entropy` (nats), means over valid tokens; each loss
      before its coefficient, as `<name>_loss`; and `experts_per_token`, the mean number of computed choices per valid
      token (for expert choice, of slots that hold the token; for dense routing, of experts with a weight above zero). A
      SoftPlan has none: its experts compute mixtures of tokens.
    updates: updates of the router's state for `functional.merge_updates`: a nested dict over its paths of `Statistics`
      of these tokens and new values; empty for most routers, and always outside training.
    probs: <float32>[G,S,E] router probabilities; routers that sample draw from them.
    extras: additional outputs of the score (`Scores.extras`).
    k: maximum number of experts computed per token, even if the plan has more choices; None if the plan determines it.
    tokens: <float32>[] number of valid tokens, the weight of these losses and metrics in a mean over batches.
    totals: names of the losses that are sums over tokens, not means.
  """
  plan: Plan
  losses: dict[str, jax.Array]
  metrics: dict[str, jax.Array]
  updates: dict[str, Any]
  probs: Float32[Array, 'G S E'] | None = None
  extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  k: int | None = dataclasses.field(default=None, metadata=dict(static=True))
  tokens: Float32[Array, ''] | None = None
  totals: tuple[str, ...] = dataclasses.field(default=(), metadata=dict(static=True))


class Router(nnx.Module):
  """Applies the six stages in order. Groups are routed independently.

  Config:
    features: the inputs of the score.
    score: computes a logit for every token and expert.
    select: chooses the experts of each token, or the tokens of each expert.
    weigh: combine weights of the chosen experts.
    place: capacity of the experts, and which choices are dropped.
    balance: {name: dict or coefficient} of balance losses and updates.
  """

  def __init__(self, *, dim: int, num_experts: int, rngs: nnx.Rngs, score: Mapping, select: Mapping,
               features: Mapping = {'name': 'token'}, weigh: Mapping = {'name': 'softmax'},
               place: Mapping = {'name': 'dropless'}, balance: Mapping = {}):
    self.num_experts, self.where = num_experts, config_path()
    self.features: Feature = FEATURES.build(features, '.features', dim=dim, rngs=rngs)
    self.score: Score = SCORES.build(score, '.score', dim=self.features.width, num_experts=num_experts, rngs=rngs)
    self.select: Selection = SELECTIONS.build(select, '.select', num_experts=num_experts)
    if self.select.reads_slots != (self.score.slots is not None):
      raise ConfigError(f': score {score["name"]!r} and select {select["name"]!r} do not fit together: '
                        "score 'soft_moe' requires select 'soft', and vice versa.")
    if self.score.with_ids != self.features.with_ids:
      raise ConfigError(f': score {score["name"]!r} and features {features["name"]!r} do not fit '
                        "together: score 'distilled' requires features 'token_with_ids', and vice versa.")
    if self.select.reads_slots and balance:
      raise ConfigError(f'.balance: Soft MoE is balanced by construction. Remove {", ".join(balance)}.')
    self.weigh: Weighting = WEIGHTINGS.build(weigh, '.weigh', num_experts=num_experts, k=self.select.k)
    if self.weigh.always_one and num_experts > 1 and jax.tree.leaves(nnx.state(self.score, nnx.Param)):
      raise ConfigError(
          '.weigh: with one expert per token, renormalised weights are always 1, so the objective gives the '
          "router no gradient. Use weigh=dict(name='softmax', order='before', renormalize='never'), or more experts "
          "per token; weigh=dict(name='one') if another loss trains the router.")
    self.place: Placement = PLACEMENTS.build(place, '.place', num_experts=num_experts, k=self.select.k)
    if self.place.soft and self.weigh.renormalize == 'after':
      raise ConfigError(f".place: {place['name']!r} does not support weigh.renormalize='after'. "
                        "Use 'before' or 'never'.")
    self.balance = balancers(balance, '.balance', num_experts=num_experts, k=self.select.k,
                             noisy=self.score.noisy)
    self._check_reads(score['name'])

  def _check_reads(self, score):
    reads = {'select': self.select.reads, **{f'balance.{name}': each.reads for name, each in self.balance.items()}}
    for name, extras in reads.items():
      missing = [extra for extra in extras if extra not in self.score.gives]
      if missing:
        able = ', '.join(repr(other) for other in SCORES if missing[0] in SCORES[other].gives)
        raise ConfigError(f'.{name} needs {missing[0]!r} from the score, which score {score!r}, as '
                          f'configured, does not provide. Scores that can: {able}.')

  def leak(self, train: bool) -> Leak:
    """Whether an output depends on later tokens of its group; determined by the config."""
    stages: tuple[Stage, ...] = (self.features, self.score, self.select, self.weigh, self.place,
                                 *self.balance.values())
    leaks: list[Leak] = [stage.leak(train) for stage in stages]
    return most_leaking(*leaks)

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs, *, key: jax.Array | None = None,
               train: bool = False) -> RouterOutput:
    """Routes every token of every group.

    Args:
      x: <float>[G,S,D].
      inputs: the router's other inputs.
      key: required in training by routers with randomness; unused at evaluation.
      train: selects training's noise, capacity and state updates.

    Raises:
      ValueError: the key or an input is missing, or the capacity is 0.
    """
    with at(self.where):
      return self._route(x, inputs, key, train)

  def _route(self, x, inputs, key, train):
    x = without_padding(x, inputs.valid)
    shared = None if inputs.shared is None else without_padding(inputs.shared, inputs.valid)
    inputs = dataclasses.replace(inputs, shared=shared)
    valid = jnp.ones(x.shape[:2], bool) if inputs.valid is None else inputs.valid
    with at('.features'):
      features = self.features(x, inputs)
    scores = self.score(features, key=derive(key, 'score'), train=train)
    gates = self.weigh.gates(scores.logits)
    if self.select.reads_gates:
      scores = dataclasses.replace(scores, select=gates)
    for balancer in self.balance.values():
      scores = balancer.adjust(scores, gates)
    with at('.select'):
      selected = self.select(scores, valid, key=derive(key, 'select'), train=train)
    selected = self.weigh.weigh(selected, scores.logits)
    with at('.place'):
      documents = dict(documents=inputs['documents']) if self.place.by_document else {}
      placed = self.place(selected, selected.pick(gates), key=derive(key, 'place'), train=train, **documents)
    placed = self.weigh.after_drops(placed, scores.logits)
    routed = Routed(scores=scores, probs=self.weigh.probs(scores.logits), plan=selected, valid=valid, placed=placed,
                    inputs=inputs)
    raw = {}
    for name, balancer in self.balance.items():
      with at(f'.balance.{name}'):
        raw[name] = balancer.loss(routed)
    raw = {name: loss for name, loss in raw.items() if loss is not None}
    balance_updates = {name: balancer.update(routed) for name, balancer in self.balance.items()}
    updates = dict(score=self.score.update(), balance=_nonempty(balance_updates)) if train else {}
    return RouterOutput(
        plan=dataclasses.replace(placed, leak=self.leak(train)),
        losses={name: self.balance[name].coefficient * loss for name, loss in raw.items()},
        metrics=jax.lax.stop_gradient({**_metrics(routed, placed, self.select.k),
                                       **{f'{name}_loss': loss for name, loss in raw.items()}}),
        updates=_nonempty(updates),
        probs=routed.probs,
        extras=scores.extras,
        k=self.select.k,
        tokens=valid.sum(dtype=jnp.float32),
        totals=tuple(name for name, balancer in self.balance.items() if balancer.total))


def build(config: Mapping, where: str, *, dim: int, num_experts: int, rngs: nnx.Rngs) -> Router:
  """Builds the router described by `config`; `where` is its config path. Raises `ConfigError`."""
  return call(Router, config, where, dim=dim, num_experts=num_experts, rngs=rngs)


def balancers(config: Mapping, where: str, *, num_experts: int, k: int | None, noisy: bool) -> Mapping[str, Balancer]:
  """The balancers named in `config`, whose entries are their keys, or their coefficient."""
  return nnx.Dict({
      name: BALANCERS.build({'name': name, **(entry if isinstance(entry, (Mapping, ConfigDict)) else
                                             {'coefficient': entry})},
                            f'{where}.{name}', num_experts=num_experts, k=k, noisy=noisy)
      for name, entry in config.items()})


def _nonempty(updates: dict[str, dict]) -> dict[str, dict]:
  return {name: update for name, update in updates.items() if update}


def _metrics(routed: Routed, placed: Plan, k: int | None) -> dict[str, jax.Array]:
  shares, computed = routed.plan.shares(), placed.shares()
  # Demand: a token's number of choices; for expert choice, 1.
  demand = routed.valid.astype(jnp.float32) if k is None else shares.sum(-1)
  # A token may choose an expert twice.
  served = jnp.minimum((computed > 0).sum(-1), demand) if k is None else computed.sum(-1)
  used = {} if isinstance(placed, SoftPlan) else dict(experts_per_token=valid_mean(
      ((computed > 0) if isinstance(placed, DensePlan) else computed).sum(-1), routed.valid))
  return dict(
      **used,
      load=shares.sum((0, 1)) / jnp.maximum(shares.sum(), jnp.finfo(jnp.float32).tiny),
      dropped=(demand - served).sum() / jnp.maximum(demand.sum(), 1),
      confidence=valid_mean(routed.probs.max(-1), routed.valid),
      entropy=valid_mean(jax.scipy.special.entr(routed.probs).sum(-1), routed.valid))
