"""Imbalance of the probability of being chosen if the noise were redrawn.

'load' is V-MoE's; 'smooth_load' that of Shazeer et al. 2017 (arXiv 1701.06538), equations 8-11, with the details of
Tensor2Tensor (`utils/expert_utils.py`).
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.config import ConfigError
from moejax.ranges import NonNegative
from moejax.routing.balance.imbalance import imbalance, squared_coefficient_of_variation
from moejax.routing.balance.requirements import choosing, choosing_by_noise
from moejax.routing.select.top_k import top_k
from moejax.routing.stages import BALANCERS, Balancer, Routed
from moejax.routing.valid_tokens import group_mean, over_tokens, token_mean


def load_loss(logits: Float32[Array, 'G S E'], clean: Float32[Array, 'G S E'], noise_std: Float32[Array, '...'] | None,
              k: int, valid: Bool[Array, 'G S']) -> Float32[Array, '']:
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


@BALANCERS('load')
class Load(Balancer):
  """See `load_loss`. Requires a score with noise; without noise it has no gradient."""

  def __init__(self, *, k: int | None, noisy: bool, coefficient: NonNegative):
    self.k = choosing(k)
    if not noisy:
      raise ConfigError(": without noise the load loss has no gradient. Set score.noise_std, e.g. '1/E'.")
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    scores = routed.scores
    return load_loss(scores.logits, scores.clean, scores.noise_std, self.k, routed.valid)


def chosen(logits: Float32[Array, '... E'], k: int) -> Bool[Array, '... E']:
  """<bool>[..., E]: whether each of `logits` <float32>[..., E] is in the top `k`; ties go to the lowest index."""
  return (top_k(logits, k)[..., None] == jnp.arange(logits.shape[-1])).any(-2)


def prob_in_top_k(logits: Float32[Array, '... E'], clean: Float32[Array, '... E'],
                  noise_std: Float32[Array, '... E'] | None, k: int) -> Float32[Array, '... E']:
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


@BALANCERS('smooth_load')
class SmoothLoad(Balancer):
  """CV^2 over experts of the sum over tokens of `prob_in_top_k` (equations 10-11).

  Without noise (at evaluation), of the counts.
  """

  def __init__(self, *, k: int | None, noisy: bool, coefficient: NonNegative):
    self.k, self.coefficient = choosing_by_noise(noisy, k), coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    scores = routed.scores
    prob = prob_in_top_k(scores.logits, scores.clean, scores.noise_std, self.k)
    return imbalance(over_tokens(prob, routed.valid), routed.valid)
