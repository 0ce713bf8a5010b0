"""Entropy losses by modality: a minority of tokens may not be crowded out of the experts (LIMoE, arXiv 2206.02770).

For the tokens of one modality with router probabilities p_t,

    local    mean_t H(p_t)                     least where the router is certain of each token
    global   max(0, log S - H(mean_t p_t))     0 where at least about S experts share the modality

With S experts equally used, H of the mean is log S: S is a soft minimum of experts.
"""
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.ranges import AtLeast, NonNegative, NotEmpty
from moejax.routing.balancing import BALANCERS, Balancer, Routed, group_mean, token_mean

# Their numbers in `RouterInputs.modalities` are their places here.
MODALITIES = ('image', 'text')


def local_entropy(logits: jax.Array, members: jax.Array) -> jax.Array:
  """Mean over the members of the entropy of their probabilities, in nats; a mean over groups that have members.

  Args:
    logits: <float32>[G,S,E].
    members: <bool>[G,S] the valid tokens of a modality.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return group_mean(token_mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1), members), members)


def global_entropy(logits: jax.Array, members: jax.Array, experts: float) -> jax.Array:
  """`max(0, log(experts) - H)`, where H is the entropy of the members' mean probability; a mean over groups.

  Args:
    logits: <float32>[G,S,E].
    members: <bool>[G,S] the valid tokens of a modality.
    experts: S; E is the loss without a threshold, `log E - H`.
  """
  mean = token_mean(jax.nn.softmax(logits, axis=-1), members)
  # The slope of p log p is infinite at 0, where probabilities underflow to.
  entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)), axis=-1)
  return group_mean(jnp.maximum(math.log(experts) - entropy, 0), members)


def members(routed: Routed, modality: str) -> jax.Array:
  """<bool>[G,S]: the valid tokens of `modality`. Raises ValueError where the model does not say what they are of."""
  return routed.valid & (routed.inputs['modalities'] == MODALITIES.index(modality))


@BALANCERS('local_entropy')
class LocalEntropy(Balancer):
  """See `local_entropy`; summed over `modalities`. On clean logits, as the importance loss.

  Config:
    modalities: of which modalities the entropies are added up.
  """

  def __init__(self, *, where: str, coefficient: NonNegative,
               modalities: Annotated[tuple[Literal['image', 'text'], ...], NotEmpty()] = ('text',)):
    self.coefficient, self.modalities = coefficient, tuple(modalities)

  def loss(self, routed: Routed) -> jax.Array:
    return sum(local_entropy(routed.scores.clean, members(routed, name)) for name in self.modalities)


@BALANCERS('global_entropy')
class GlobalEntropy(Balancer):
  """See `global_entropy`; summed over modalities. On clean logits, as the importance loss.

  Config:
    image_experts, text_experts: S of each; None leaves the modality alone.
  """

  def __init__(self, *, where: str, num_experts: int, coefficient: NonNegative,
               image_experts: Annotated[float, AtLeast(1)] | None = None,
               text_experts: Annotated[float, AtLeast(1)] | None = None):
    wanted = zip(MODALITIES, (image_experts, text_experts))
    self.experts = {name: experts for name, experts in wanted if experts is not None}
    if not self.experts:
      raise ConfigError(f'{where}: set image_experts, text_experts or both.')
    for name, experts in self.experts.items():
      if experts > num_experts:
        raise ConfigError(f'{where}.{name}_experts must lie between 1 and num_experts = {num_experts}, not {experts}: '
                          'no modality can use more experts than there are.')
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    return sum(global_entropy(routed.scores.clean, members(routed, name), experts)
               for name, experts in self.experts.items())
