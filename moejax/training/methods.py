"""Training methods: how an objective is computed from passes of the model. One of them is `config.method`.

A method is called with `forward(key, batch) -> ModelOutput`, one pass in training mode of the current parameters, and
returns the objective of the step; router losses come from the output that it returns. `passes`: number of passes.
"""
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from moejax.config import ConfigError, Registry
from moejax.models.output import ModelOutput
from moejax.random import derive
from moejax.ranges import NonNegative
from moejax.routing.router import RouterOutput
from moejax.training.objectives import Batch, Metrics, Objective

Forward = Callable[[jax.Array | None, Batch], ModelOutput]


class Method:
  """Base class of training methods.

  Attributes:
    passes: number of passes of the model in a step.
  """
  passes: ClassVar[int] = 1

  def __call__(self, forward: Forward, objective: Objective, batch: Batch,
               key: jax.Array) -> tuple[jax.Array, Metrics, ModelOutput]:
    """(objective, its metrics, the output whose router losses and updates are used)."""
    raise NotImplementedError


METHODS = Registry('training method', Method)


@METHODS('plain')
class Plain(Method):
  """The objective of a single pass."""
  passes = 1

  def __call__(self, forward: Forward, objective: Objective, batch: Batch,
               key: jax.Array) -> tuple[jax.Array, Metrics, ModelOutput]:
    """(objective, its metrics, the output whose router losses and updates are used)."""
    output = forward(key, batch)
    return *objective(output, batch), output


@METHODS('consistency')
@dataclasses.dataclass(frozen=True)
class Consistency(Method):
  """Two passes with different random numbers, regularised to agree (THOR, arXiv 2110.04260, equation 6).

  `objective(p1) + objective(p2) + alpha * symmetric_kl(p1, p2)`. Router losses come from both passes, router
  updates from the first only, so that step counters count one step.

  Config:
    alpha: weight of the divergence; microsoft/Stochastic-Mixture-of-Experts: 5 in its script, 1 by default.
  """
  alpha: NonNegative = 5.0
  passes = 2

  def __call__(self, forward: Forward, objective: Objective, batch: Batch,
               key: jax.Array) -> tuple[jax.Array, Metrics, ModelOutput]:
    """See the module. The metrics are means over the passes, and the divergence as `disagreement`."""
    first, second = (forward(derive(key, name), batch) for name in ('first', 'second'))
    loss, metrics = objective(first, batch)
    second_loss, second_metrics = objective(second, batch)
    disagreement = objective.mean(symmetric_kl(first.logits, second.logits), batch)
    routers = {layer: dataclasses.replace(router, losses={
        name: loss + second.routers[layer].losses[name] for name, loss in router.losses.items()})
               for layer, router in first.routers.items()}
    metrics = {name: (value + second_metrics[name]) / 2 for name, value in metrics.items()}
    return (loss + second_loss + self.alpha * disagreement, {**metrics, 'disagreement': disagreement},
            dataclasses.replace(first, routers=routers))


def symmetric_kl(one: jax.Array, other: jax.Array) -> jax.Array:
  """`(KL(p||q) + KL(q||p)) / 2 = sum_v (p - q) (log p - log q) / 2` of two softmaxes; the gradient goes through both.

  Args:
    one, other: <float>[..., V] logits.

  Returns:
    <float32>[...].
  """
  log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (one, other))
  return ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(-1) / 2


@METHODS('reinforce')
@dataclasses.dataclass(frozen=True)
class Reinforce(Method):
  """The routers of a language model as policies (RL-R of arXiv 2202.01169, section 3.3).

  Every router draws an expert for each token (select 'sample', k = 1). The reward of the draw is the log-probability of
  that token's target; the gradient of its expectation is estimated with `surrogate`, which is added to the objective
  for every router. Everything else is trained by the objective itself, as usual.

  Config:
    coefficient: of the surrogate; 0 leaves the objective alone.
    baseline: subtracted from the reward: the router's own prediction ('learned', with score 'policy'), the mean over
      the batch ('batch'), or nothing ('none').
    entropy: coefficient of the policy's entropy, which is maximised.
    value: coefficient of the squared error of the learned baseline.
  """
  coefficient: NonNegative = 0.1
  baseline: Literal['learned', 'batch', 'none'] = 'learned'
  entropy: NonNegative = 0.01
  value: NonNegative = 0.1
  passes = 1

  def __call__(self, forward: Forward, objective: Objective, batch: Batch,
               key: jax.Array) -> tuple[jax.Array, Metrics, ModelOutput]:
    """See the module. Metrics: the objective's, and means over tokens and routers of the `advantage`, the
    `policy_entropy` and, with a learned baseline, the `value_loss`.

    Raises:
      ConfigError: while tracing: the routers do not sample experts, or the objective does not score their tokens.
    """
    output = forward(key, batch)
    loss, metrics = objective(output, batch)
    log_likelihood = getattr(objective, 'log_likelihood', None)
    if not output.routers or log_likelihood is None:
      raise ConfigError("config.method 'reinforce' is for language models with mixtures of experts.")
    reward = jax.lax.stop_gradient(log_likelihood(output, batch))
    totals: dict[str, Any] = {'policy': 0., 'advantage': 0., 'policy_entropy': 0., 'value_loss': 0.}
    for layer, router in output.routers.items():
      log_prob, entropy = (x.reshape(reward.shape) for x in drawn(layer, router, reward.size))
      baseline = objective.mean(reward, batch) if self.baseline == 'batch' else jnp.float32(0)
      if self.baseline == 'learned':
        if 'value' not in router.extras:
          raise ConfigError(f"config.method.baseline: the router {layer} has no learned one. Set router.score.name="
                            "'policy', or baseline to 'batch' or 'none'.")
        baseline = router.extras['value'].reshape(reward.shape)
        totals['value_loss'] += objective.mean(jnp.square(reward - baseline), batch)
      advantage = reward - jax.lax.stop_gradient(baseline)
      totals['policy'] += objective.mean(surrogate(log_prob, advantage), batch)
      totals['advantage'] += objective.mean(advantage, batch) / len(output.routers)
      totals['policy_entropy'] += objective.mean(entropy, batch) / len(output.routers)
    policy = totals.pop('policy') - self.entropy * len(output.routers) * totals['policy_entropy']
    return loss + self.coefficient * policy + self.value * totals['value_loss'], {**metrics, **totals}, output


def surrogate(log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
  """The loss whose gradient, averaged over draws, is that of the negative expected reward (Williams 1992).

  Args:
    log_prob: <float32>[...] of the drawn experts.
    advantage: <float32>[...] reward minus a baseline that does not depend on the draw; a constant.
  """
  return -jax.lax.stop_gradient(advantage) * log_prob


def drawn(layer: str, router: RouterOutput, tokens: int) -> tuple[jax.Array, jax.Array]:
  """Log-probability of the drawn expert, and entropy of the policy, <float32>[G,S] each."""
  expert = getattr(router.plan, 'expert', None)
  if expert is None or expert.shape[-1] != 1 or router.probs is None or expert.size != tokens:
    raise ConfigError(f"config.method 'reinforce': the router {layer} does not draw one expert for each predicted "
                      "token. Use papers.rl_routing(), or select=dict(name='sample', k=1), in a decoder.")
  prob = router.plan.pick(router.probs)[..., 0]
  # Never zero for a drawn expert, but nothing is drawn for padding.
  log_prob = jnp.log(jnp.maximum(prob, jnp.finfo(jnp.float32).tiny))
  return log_prob, jax.scipy.special.entr(router.probs).sum(-1)
