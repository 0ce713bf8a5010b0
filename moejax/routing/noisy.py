"""Noisy top-k gating: noise of learned size, and balance losses over actual and potential choices.

Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), equations 3-11, with the details of
`noisy_top_k_gating` in Tensor2Tensor (`utils/expert_utils.py`).
"""
from flax import nnx
import jax
import jax.numpy as jnp

from moejax import functional
from moejax.config import ConfigError
from moejax.ranges import NonNegative
from moejax.routing.balancing import (BALANCERS, Balancer, Routed, choosing, group_mean,
                                      squared_coefficient_of_variation)
from moejax.routing.scores import SCORES, Score, Scores, noiseless, product, required, vectors
from moejax.routing.selection import top_k
from moejax.routing.shares import scaled


def learned_noise_std(raw: jax.Array, floor: float) -> jax.Array:
  """`softplus(raw) + floor` (equation 4; only Tensor2Tensor has a floor, 0.01), of the shape of `raw`.

  At least 1e-6, because losses divide by it and the softplus of a large negative number underflows to 0.
  """
  return jnp.maximum(jax.nn.softplus(raw) + floor, 1e-6)


@SCORES('noisy_linear')
class NoisyLinear(Score):
  """`x W + normal * softplus(x W_noise)`, the noise in training only (equation 4).

  Config:
    init_std: initial standard deviation of both kernels; 0 (appendix A): all experts equally likely.
    noise_floor: minimum standard deviation of the noise: 0.01 in Tensor2Tensor, 0 in the paper.
  """

  noisy = True

  def __init__(self, *, where: str, dim: int | None, num_experts: int, rngs: nnx.Rngs, init_std: NonNegative = 0.,
               noise_floor: NonNegative = 1e-2):
    shape, init = (vectors(dim, where), num_experts), nnx.initializers.normal(init_std)
    self.kernel = functional.parameter(rngs, init, shape, ('embed', None))
    self.noise_kernel = functional.parameter(rngs, init, shape, ('embed', None))
    self.noise_floor = noise_floor

  def __call__(self, features: jax.Array, *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]; the standard deviation of the noise is [G,S,E]."""
    clean = product(features, self.kernel[...])
    if not train:
      return noiseless(clean)
    std = learned_noise_std(product(features, self.noise_kernel[...]), self.noise_floor)
    logits = clean + std * jax.random.normal(required(key, 'score "noisy_linear"'), clean.shape)
    return Scores(logits=logits, select=logits, clean=clean, noise_std=std)


def chosen(logits: jax.Array, k: int) -> jax.Array:
  """<bool>[..., E]: whether each of `logits` <float32>[..., E] is in the top `k`; ties go to the lowest index."""
  return (top_k(logits, k)[..., None] == jnp.arange(logits.shape[-1])).any(-2)


def prob_in_top_k(logits: jax.Array, clean: jax.Array, noise_std: jax.Array | None, k: int) -> jax.Array:
  """Probability of being in the top k if only this expert's noise were redrawn (equations 8-9).

  The threshold is the k-th largest of the *other* noisy logits: the (k+1)-th of all for a chosen expert, the k-th for
  the others. V-MoE's load loss uses the k-th for both.

  Args:
    logits: <float32>[..., E], with noise.
    clean: <float32>[..., E], without.
    noise_std: <float32>[..., E] standard deviation of the noise; None (or k = E): 1 if chosen, else 0, no gradient.
    k: K.

  Returns:
    <float32>[..., E].
  """
  is_in = chosen(logits, k)
  if noise_std is None or k == logits.shape[-1]:
    return is_in.astype(jnp.float32)
  best = jnp.take_along_axis(logits, top_k(logits, k + 1), axis=-1)
  threshold = jnp.where(is_in, best[..., k:], best[..., k - 1:k])
  return jax.scipy.stats.norm.cdf((clean - threshold) / noise_std)


def over_tokens(values: jax.Array, valid: jax.Array) -> jax.Array:
  """<float32>[G,S,...] -> [G,...]: the sum over the valid tokens of every group; `valid` <bool>[G,S]."""
  return jnp.sum(jnp.where(valid.reshape(*valid.shape, *(1,) * (values.ndim - 2)), values, 0), axis=1)


def imbalance(amounts: jax.Array, valid: jax.Array) -> jax.Array:
  """CV^2 over experts, averaged over groups with a valid token; `amounts` <float32>[G,E], `valid` <bool>[G,S]."""
  # Scaled, because the squares of tiny weights or probabilities would underflow.
  return group_mean(squared_coefficient_of_variation(scaled(amounts)), valid)


@BALANCERS('gate_importance')
class GateImportance(Balancer):
  """CV^2 over experts of their total combine weights (equations 6-7): sparse, and with noise.

  V-MoE's 'importance' uses the softmax over all experts, without noise.
  """

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> jax.Array:
    return imbalance(over_tokens(routed.plan.to_dense().weight, routed.valid), routed.valid)


def check_noise(noisy: bool, k: int | None, where: str):
  """Raises ConfigError unless routing is token choice by noisy scores."""
  choosing(k, where)
  if not noisy:
    raise ConfigError(f"{where}: without noise the load loss has no gradient. Use score 'noisy_linear'.")


@BALANCERS('smooth_load')
class SmoothLoad(Balancer):
  """CV^2 over experts of the sum over tokens of `prob_in_top_k` (equations 10-11).

  Without noise (at evaluation), of the counts.
  """

  def __init__(self, *, where: str, k: int | None, noisy: bool, coefficient: NonNegative):
    check_noise(noisy, k, where)
    self.k, self.coefficient = k, coefficient

  def loss(self, routed: Routed) -> jax.Array:
    scores = routed.scores
    prob = prob_in_top_k(scores.logits, scores.clean, scores.noise_std, self.k)
    return imbalance(over_tokens(prob, routed.valid), routed.valid)
