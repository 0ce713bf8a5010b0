"""Balancing: losses and router-state updates that keep the experts evenly used.

`balance=dict(importance=0.005, bias=dict(rate=1e-3))` names balancers of this package; a number is short for
`dict(coefficient=number)`. Balancers that are not named cost nothing. Losses are means over the routing groups that
have a valid token, and over valid tokens within a group; the z-loss is the mean over all valid tokens.
"""
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moejax import functional
from moejax.config import ConfigError, Registry
from moejax.ranges import NonNegative
from moejax.routing.features import RouterInputs
from moejax.routing.plans import Plan
from moejax.routing.scores import Scores
from moejax.routing.selection import top_k

@dataclasses.dataclass(frozen=True)
class Routed:
  """The inputs of balancing.

  Attributes:
    scores: of the score stage.
    probs: <float32>[G,S,E] router probabilities (`weighting.router_probs`).
    plan: the selected plan, before capacity.
    valid: <bool>[G,S].
    placed: the plan after capacity.
    inputs: the router's other inputs.
  """
  scores: Scores
  probs: jax.Array
  plan: Plan
  valid: jax.Array
  placed: Plan | None = None
  inputs: RouterInputs = RouterInputs()


class Balancer(nnx.Module):
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
  reads: ClassVar[tuple[str, ...]] = ()

  def loss(self, routed: Routed) -> jax.Array | None:
    """A scalar before its coefficient, or None."""
    return None

  def adjust(self, scores: Scores, gates: jax.Array) -> Scores:
    """The scores with an adjusted `select`; `gates` <float32>[G,S,E] come from the weighting."""
    return scores

  def update(self, routed: Routed) -> dict[str, functional.Statistics]:
    """Statistics that update this module's state, by name: sums over tokens, applied once per step."""
    return {}


BALANCERS = Registry('balance', Balancer, context=('num_experts', 'k', 'noisy'))


def build(config: Mapping, where: str, **context) -> nnx.Dict:
  """Builds the balancers named in `config`. `context`: num_experts, rngs, k, noisy."""
  return nnx.Dict({
      name: BALANCERS.build({'name': name, **(entry if isinstance(entry, (Mapping, ConfigDict)) else
                                             {'coefficient': entry})}, f'{where}.{name}', **context)
      for name, entry in config.items()})


def choosing(k: int | None, where: str) -> int:
  """Returns `k`; raises ConfigError if it is None. `where`: config path of the balancer."""
  if k is None:
    raise ConfigError(f'{where} requires token choice with a fixed number of experts; this selection needs no '
                      'balancing. Remove it.')
  return k


def token_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float>[G,S,...] -> [G,...]: mean over the valid tokens of every group; 0 for a group without valid tokens."""
  valid = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
  return jnp.sum(jnp.where(valid, values, 0), axis=1) / jnp.maximum(valid.sum(1), 1)


def group_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float>[G] -> scalar: mean over the groups with a valid token."""
  some = valid.any(axis=1)
  return jnp.sum(jnp.where(some, values, 0)) / jnp.maximum(some.sum(), 1)


def valid_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float>[G,S] -> scalar: mean over the valid tokens of all groups; 0 where there are none."""
  return jnp.sum(jnp.where(valid, values, 0)) / jnp.maximum(valid.sum(), 1)


def squared_coefficient_of_variation(values: jax.Array) -> jax.Array:
  """Population variance over squared mean of the last axis (as V-MoE and Tensor2Tensor; FastMoE and Tutel use the
  unbiased variance, E/(E-1) times this). 0 where the mean is 0."""
  mean = values.mean(-1)
  return values.var(-1) / jnp.where(mean == 0, 1, mean**2)


def importance_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
  """CV^2 over experts of their total probability (Shazeer et al., equation 7; V-MoE, appendix A). 0 at uniform.

  Args:
    logits: <float32>[G,S,E], without noise.
    valid: <bool>[G,S].
  """
  importance = token_mean(jax.nn.softmax(logits, axis=-1), valid)
  return group_mean(squared_coefficient_of_variation(importance), valid)


def load_loss(logits: jax.Array, clean: jax.Array, noise_std: jax.Array | None, k: int, valid: jax.Array) -> jax.Array:
  """CV^2 over experts of the probability of being in the top k if the noise were redrawn (V-MoE, appendix A).

  The threshold is the k-th largest noisy logit, even for the experts above it, as in google-research/vmoe.

  Args:
    logits: <float32>[G,S,E], with noise.
    clean: <float32>[G,S,E], without.
    noise_std: standard deviation of the noise; None is the limit 0: hard counts, without a gradient.
    k: K.
    valid: <bool>[G,S].
  """
  best = top_k(logits, k)[..., -1:]
  margin = clean - jnp.take_along_axis(logits, best, axis=-1)
  if noise_std is None:
    chosen = (margin >= 0).astype(jnp.float32)
  else:
    chosen = jax.scipy.stats.norm.cdf(margin / noise_std)
  return group_mean(squared_coefficient_of_variation(token_mean(chosen, valid)), valid)


Convention = Literal['moejax', 'gshard', 'fairseq', 'flaxformer', 'mixtral', 'deepspeed']


def switch_loss(probs: jax.Array, expert: jax.Array, routed: jax.Array, valid: jax.Array,
                convention: Convention = 'moejax') -> jax.Array:
  """`E * sum_e F_e P_e`: P_e mean probability, F_e share of choices (Switch Transformer, equation 4).

      convention   F_e counts                            at uniform routing
      moejax       all K choices, sums to 1              1
      gshard       first choices                         1   (also Switch, Mesh TensorFlow, lingvo)
      fairseq      first choices                         1
      flaxformer   all K choices, sums to K              K
      mixtral      all K choices, sums to K, and F and   K
                   P are of all groups together
      deepspeed    first choices for K <= 2, else all    1
                   K choices, sums to 1

  Choices are counted before capacity. Only P has a gradient.

  Args:
    probs: <float32>[G,S,E] summing to 1 over E.
    expert: <int32>[G,S,K].
    routed: <bool>[G,S,K]; False: not a choice (padding, or a second expert that was not sampled).
    valid: <bool>[G,S].
    convention: one of the above.
  """
  num_experts, k = probs.shape[-1], expert.shape[-1]
  if convention in ('gshard', 'fairseq') or (convention == 'deepspeed' and k <= 2):
    expert, routed = expert[..., :1], routed[..., :1]
  if convention == 'mixtral':
    probs, expert, routed, valid = (a.reshape(1, -1, *a.shape[2:]) for a in (probs, expert, routed, valid))
  chosen = (expert[..., None] == jnp.arange(num_experts)) & routed[..., None]
  share = token_mean(chosen.sum(2).astype(jnp.float32), valid)
  if convention not in ('flaxformer', 'mixtral'):
    share /= jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  return group_mean(num_experts * jnp.sum(share * token_mean(probs, valid), axis=-1), valid)


def z_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean over valid tokens of `logsumexp(logits)^2` (ST-MoE, equation 5). `(ln E)^2` at zero logits.

  Args:
    logits: <float32>[G,S,E].
    valid: <bool>[G,S].
  """
  return valid_mean(jax.nn.logsumexp(logits, axis=-1)**2, valid)


def bias_step(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
  """One step of loss-free balancing: `b_e + rate * sign(mean(load) - load_e)` (Algorithm 1 of its paper).

  Args:
    bias: <float32>[..., E].
    load: <float32>[..., E] number of choices of every expert in the whole batch.
    rate: u.
  """
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


@dataclasses.dataclass(frozen=True)
class BiasStep:
  """`bias_step` with a fixed rate."""
  rate: float

  def __call__(self, bias: jax.Array, load: jax.Array) -> jax.Array:
    return bias_step(bias, load, self.rate)


@BALANCERS('importance')
class Importance(Balancer):
  """See `importance_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    return importance_loss(routed.scores.clean, routed.valid)


@BALANCERS('load')
class Load(Balancer):
  """See `load_loss`. Requires a score with noise; without noise it has no gradient."""

  def __init__(self, *, where: str, k: int | None, noisy: bool, coefficient: NonNegative):
    self.k = choosing(k, where)
    if not noisy:
      raise ConfigError(f"{where}: without noise the load loss has no gradient. Set score.noise_std, e.g. '1/E'.")
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    scores = routed.scores
    return load_loss(scores.logits, scores.clean, scores.noise_std, self.k, routed.valid)


@BALANCERS('switch')
class Switch(Balancer):
  """See `switch_loss`.

  Config:
    convention: what F_e counts; see `switch_loss`.
  """

  def __init__(self, *, where: str, k: int | None, coefficient: NonNegative, convention: Convention = 'moejax'):
    choosing(k, where)
    self.coefficient, self.convention = coefficient, convention

  def loss(self, routed: Routed) -> jax.Array:
    return switch_loss(routed.probs, routed.plan.expert, routed.plan.kept, routed.valid, self.convention)


@BALANCERS('z')
class Z(Balancer):
  """See `z_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    return z_loss(routed.scores.clean, routed.valid)


@BALANCERS('bias')
class Bias(Balancer):
  """A bias on the selection scores, never on the weights, stepped against the load (loss-free balancing, section 3).

  It is added to the gates (sigmoid or softmax), not to the logits.

  Config:
    rate: u, the size of a step.
  """

  def __init__(self, *, where: str, k: int | None, num_experts: int, rate: NonNegative = 1e-3):
    choosing(k, where)
    self.rate = rate
    self.bias = functional.router_state(jnp.zeros(num_experts), (None,))

  def adjust(self, scores: Scores, gates: jax.Array) -> Scores:
    return dataclasses.replace(scores, select=gates + jax.lax.stop_gradient(self.bias[...]))

  def update(self, routed: Routed) -> dict[str, functional.Statistics]:
    return {'bias': functional.Statistics(routed.plan.shares().sum((0, 1)), BiasStep(self.rate))}
