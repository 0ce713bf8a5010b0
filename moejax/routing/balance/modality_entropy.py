"""Entropy losses per modality, which keep a rarer modality from being crowded out of the experts (LIMoE, 2206.02770).

For the tokens of one modality with router probabilities p_t,

    local    mean_t H(p_t)                     minimal when the router is certain about each token
    global   max(0, log S - H(mean_t p_t))     0 when at least about S experts share the modality

With S equally used experts, H of the mean is log S: S is a soft minimum of the number of experts.
"""
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.config import ConfigError
from moejax.ranges import AtLeast, NonNegative, NotEmpty
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import group_mean, token_mean

# `RouterInputs.modalities` holds indices into this tuple.
MODALITIES = ('image', 'text')


def local_entropy(logits: Float32[Array, 'G S E'], members: Bool[Array, 'G S']) -> Float32[Array, '']:
  """Mean entropy of the members' probabilities, in nats, averaged over the groups that have members.

  Args:
    logits: <float32>[G,S,E].
    members: <bool>[G,S] the valid tokens of a modality.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return group_mean(token_mean(-jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1), members), members)


def global_entropy(logits: Float32[Array, 'G S E'], members: Bool[Array, 'G S'], experts: float) -> Float32[Array, '']:
  """`max(0, log(experts) - H)`, where H is the entropy of the members' mean probability; averaged over groups.

  Args:
    logits: <float32>[G,S,E].
    members: <bool>[G,S] the valid tokens of a modality.
    experts: S; with S = E the loss has no threshold: `log E - H`.
  """
  mean = token_mean(jax.nn.softmax(logits, axis=-1), members)
  # Probabilities may underflow to 0, where the slope of p log p is infinite.
  entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)), axis=-1)
  return group_mean(jnp.maximum(math.log(experts) - entropy, 0), members)


def members(routed: Routed, modality: str) -> Bool[Array, 'G S']:
  """<bool>[G,S]: the valid tokens of `modality`. Raises ConfigError if the model supplies no modalities."""
  return routed.valid & (routed.inputs['modalities'] == MODALITIES.index(modality))


@BALANCERS('local_entropy')
class LocalEntropy(Balancer):
  """See `local_entropy`; summed over `modalities`. Uses clean logits, like the importance loss.

  Config:
    modalities: the modalities whose entropies are summed.
  """

  def __init__(self, *, coefficient: NonNegative,
               modalities: Annotated[tuple[Literal['image', 'text'], ...], NotEmpty()] = ('text',)):
    self.coefficient, self.modalities = coefficient, tuple(modalities)

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return sum((local_entropy(routed.scores.clean, members(routed, name)) for name in self.modalities), jnp.float32(0))


@BALANCERS('global_entropy')
class GlobalEntropy(Balancer):
  """See `global_entropy`; summed over modalities. Uses clean logits, like the importance loss.

  Config:
    image_experts, text_experts: S of each; None: no loss for that modality.
  """

  def __init__(self, *, num_experts: int, coefficient: NonNegative,
               image_experts: Annotated[float, AtLeast(1)] | None = None,
               text_experts: Annotated[float, AtLeast(1)] | None = None):
    wanted = zip(MODALITIES, (image_experts, text_experts))
    self.experts = {name: experts for name, experts in wanted if experts is not None}
    if not self.experts:
      raise ConfigError(': set image_experts, text_experts or both.')
    for name, experts in self.experts.items():
      if experts > num_experts:
        raise ConfigError(f'.{name}_experts must be between 1 and num_experts = {num_experts}, not {experts}.')
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return sum((global_entropy(routed.scores.clean, members(routed, name), experts)
                for name, experts in self.experts.items()), jnp.float32(0))
