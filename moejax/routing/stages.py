"""The six stages of a router: what each is given, what it returns, and what it says of itself.

    Feature     features(x, inputs)                        -> features[G,S,width], or ids[G,S]
    Score       score(features, key=, train=)              -> Scores: logits[G,S,E]
    Selection   select(scores, valid, key=, train=)        -> Plan, with weights one
    Weighting   weigh.weigh(plan, logits)                  -> Plan, with combine weights
    Placement   place(plan, gates, key=, train=)           -> Plan, without the choices that have no slot
    Balancer    balance.loss(routed)                       -> a loss

A stage is a class registered under the name that configs use. Stages that may hold parameters or state (features,
scores, balancers) are modules, whose keys are the arguments of `__init__`; the others are frozen dataclasses, whose keys
are their fields. Ties always go to the lowest index.
"""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray, Shaped

from moejax import functional
from moejax.config import Registry
from moejax.routing.inputs import RouterInputs
from moejax.routing.logits import router_probs, softmax_over_experts
from moejax.routing.plans import Leak, Plan


class Stage:
  """Base class of all stages."""

  def leak(self, train: bool) -> Leak:
    """How this stage's result for a token depends on later tokens of its group; 'causal' unless overridden."""
    return 'causal'


def required(key: jax.Array | None, what: str) -> PRNGKeyArray:
  """Returns `key`; raises ValueError if it is None, since training without the configured noise is another router."""
  if key is None:
    raise ValueError(f'{what} draws random numbers in training: call the router with key=..., or with train=False.')
  return key


# ---- features -------------------------------------------------------------------------------------------------------


class Feature(Stage, nnx.Module):
  """Base class of features: the inputs of the score.

  Attributes:
    width: of the vectors it returns; None if it returns ids.
    with_ids: it returns activations together with token ids, for scores that need both.
  """

  width: int | None = None
  with_ids: bool = False

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Any:
    """`x`: <float>[G,S,D] -> <float32>[G,S,width], or ids <int32>[G,S].

    Raises:
      ConfigError: the model does not supply an input.
    """
    raise NotImplementedError


FEATURES = Registry('router feature', Feature, context=('dim', 'rngs'))


# ---- score ----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """Output of the score stage, in float32 whatever the dtype of the activations.

  Attributes:
    logits: <float32>[G,S,E] with noise; weights are computed from them. For Soft MoE one per slot, [G,S,E,C].
    select: <float32>[G,S,E] ranking for the selection; the logits unless a stage (a balancing bias) changes it.
    clean: <float32>[G,S,E] the logits before noise, for the importance loss and the z-loss.
    noise_std: <float32> scalar or [G,S,E]: standard deviation of the noise; None without noise, as at evaluation.
    extras: additional outputs by name, for selections and balancers made for the score.
  """
  logits: Float32[Array, 'G S E']
  select: Float32[Array, 'G S E']
  clean: Float32[Array, 'G S E']
  noise_std: Float32[Array, '...'] | None = None
  extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


def noiseless(logits: Float32[Array, '... E'], extras: Mapping[str, Shaped[Array, '...']] = {}) -> Scores:
  """Scores without noise: `logits` throughout."""
  return Scores(logits=logits, select=logits, clean=logits, extras=dict(extras))


def gaussian(clean: Float32[Array, 'G S E'], noise_std: float, key: jax.Array,
             extras: Mapping[str, Shaped[Array, '...']] = {}) -> Scores:
  """`clean` logits <float32>[G,S,E] plus Gaussian noise with the same standard deviation for all."""
  logits = clean + noise_std * jax.random.normal(key, clean.shape)
  return Scores(logits=logits, select=logits, clean=clean, noise_std=jnp.float32(noise_std), extras=dict(extras))


class Score(Stage, nnx.Module):
  """Base class of scores: a logit for every token and expert. Noise and jitter are added here, in training only.

  Attributes:
    noisy: it adds Gaussian noise and reports its standard deviation, which the load loss needs.
    slots: its logits are [G,S,E,slots] (Soft MoE); None: [G,S,E].
    gives: the keys it sets in `Scores.extras` for other stages.
    with_ids: it needs activations and token ids (features 'token_with_ids').
  """

  noisy: bool = False
  slots: int | None = None
  gives: tuple[str, ...] = ()
  with_ids: bool = False

  def __call__(self, features: Any, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,width] or <int32>[G,S], of the feature stage."""
    raise NotImplementedError

  def update(self) -> dict[str, Any]:
    """New values of this module's state (`functional.router_state`) after a training step, by name.

    They depend only on parameters and state. State that depends on the batch is updated by `functional.Statistics`.
    """
    return {}


# `dim` is the features' width, None for ids.
SCORES = Registry('router score', Score, context=('dim', 'num_experts', 'rngs'))


# ---- select ---------------------------------------------------------------------------------------------------------


class Selection(Stage):
  """Base class of selections: token choice, expert choice, all experts.

  Attributes:
    k: experts per token; None if tokens do not choose a fixed number.
    reads_slots: it needs logits [G,S,E,C], one per slot.
    reads_gates: it ranks by the weighting's gates instead of logits.
    reads: the keys of `Scores.extras` it needs.
  """

  k: int | None
  reads_slots = False
  reads_gates = False
  reads: tuple[str, ...] = ()

  def leak(self, train: bool) -> Leak:
    raise NotImplementedError  # too easily wrong by default

  def __call__(self, scores: Scores, valid: Bool[Array, 'G S'], *, key: jax.Array | None, train: bool) -> Plan:
    """A plan with weights one, or the selection's own weights, which weighting multiplies.

    Args:
      scores: whose `select` ranks the experts.
      valid: <bool>[G,S]; other tokens are not routed.
      key: for random choices.
      train: selects training's policy.
    """
    raise NotImplementedError


SELECTIONS = Registry('router selection', Selection, context=('num_experts',))


# ---- weigh ----------------------------------------------------------------------------------------------------------

Renormalize = Literal['never', 'before', 'after']


class Weighting(Stage):
  """Base class of weightings. By default gates are a softmax, and weights do not change when choices are dropped.

  Attributes:
    renormalize: whether a token's weights are normalised to sum to 1, 'before' or 'after' choices are dropped.
  """

  renormalize: Renormalize = 'never'

  def gates(self, logits: Float32[Array, 'G S *E']) -> Float32[Array, 'G S *E']:
    """<float32>[G,S,E,..] a value per expert, before any normalisation over the selected ones."""
    return softmax_over_experts(logits)

  def probs(self, logits: Float32[Array, 'G S E *C']) -> Float32[Array, 'G S E']:
    """<float32>[G,S,E] the gates as a distribution over experts."""
    return router_probs(self.gates(logits))

  def weigh(self, plan: Plan, logits: Float32[Array, 'G S E *C']) -> Plan:
    """`plan` with the weights of the selection, before choices are dropped. `logits`: <float32>[G,S,E,..]."""
    raise NotImplementedError

  def after_drops(self, plan: Plan, logits: Float32[Array, 'G S E *C']) -> Plan:
    """`plan` with its final weights, after choices are dropped."""
    return plan

  @property
  def always_one(self) -> bool:
    """Whether weights are always 1 by normalisation, which leaves the router without a gradient from the output."""
    return False


WEIGHTINGS = Registry('router weighting', Weighting, context=('num_experts', 'k'))


# ---- place ----------------------------------------------------------------------------------------------------------


class Placement(Stage):
  """Base class of placements: how many slots an expert has in each group, and which choices get them. Padding has none.

  Attributes:
    soft: it returns a SoftPlan.
    by_document: it also takes `documents` <int32>[G,S], ids of documents, whose tokens are contiguous.
  """

  soft = False
  by_document = False

  def leak(self, train: bool) -> Leak:
    raise NotImplementedError  # too easily wrong by default

  def __call__(self, plan: Any, gates: Float32[Array, 'G ...'], *, key: jax.Array | None, train: bool) -> Plan:
    """`plan` with only the entries that have a slot.

    Args:
      plan: with its weights.
      gates: <float32>, one value per entry of the plan ([G,S,K] for a TokenPlan).
      key: for random priorities.
      train: selects training's capacity.
    """
    raise NotImplementedError


PLACEMENTS = Registry('router placement', Placement, context=('num_experts', 'k'))


# ---- balance --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Routed:
  """The inputs of balancing.

  Attributes:
    scores: of the score stage.
    probs: <float32>[G,S,E] router probabilities (`shares.router_probs`).
    plan: the selected plan, before capacity.
    valid: <bool>[G,S].
    placed: the plan after capacity.
    inputs: the router's other inputs.
  """
  scores: Scores
  probs: Float32[Array, 'G S E']
  plan: Any
  valid: Bool[Array, 'G S']
  placed: Any = None
  inputs: RouterInputs = RouterInputs()


class Balancer(Stage, nnx.Module):
  """One entry of `balance`: a loss, or state that changes the selection and is updated after every step.

  Config:
    coefficient: factor of the loss when it is added to the objective. Non-negative: a negative one would reward
      imbalance without bound.

  Attributes:
    reads: the keys of `Scores.extras` it needs.
    total: its loss is a sum over tokens, to be added over the parts of a batch; other losses are averaged.
  """

  coefficient: float = 0.
  total: bool = False
  reads: tuple[str, ...] = ()

  def loss(self, routed: Routed) -> Float32[Array, ''] | None:
    """A scalar before its coefficient, or None."""
    return None

  def adjust(self, scores: Scores, gates: Float32[Array, 'G S E']) -> Scores:
    """The scores with an adjusted `select`; `gates` <float32>[G,S,E] come from the weighting."""
    return scores

  def update(self, routed: Routed) -> dict[str, functional.Statistics]:
    """Statistics that update this module's state, by name: sums over tokens, applied once per step."""
    return {}


# `noisy` says whether the score adds noise of known size.
BALANCERS = Registry('balance', Balancer, context=('num_experts', 'k', 'noisy'))
