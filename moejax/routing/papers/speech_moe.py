"""SpeechMoE: routers that also see the output of a shared embedding network."""
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from moejax.config import ConfigError
from moejax.ranges import Natural, NonNegative
from moejax.routing.inputs import RouterInputs
from moejax.routing.papers import paper
from moejax.routing.stages import BALANCERS, FEATURES, Balancer, Feature, Routed
from moejax.routing.valid_tokens import valid_mean


@FEATURES('with_shared')
class WithShared(Feature):
  """The output of the shared embedding network, concatenated with the activations (SpeechMoE, section 3.1).

  Config:
    shared_dim: output width of that network; 0 omits it (the paper's local router, for comparison).
  """

  def __init__(self, *, dim: int, shared_dim: Natural):
    self.shared_dim, self.width = shared_dim, shared_dim + dim

  def __call__(self, x: Float[Array, 'G S D'], inputs: RouterInputs) -> Float32[Array, 'G S width']:
    """`x`: <float>[G,S,D] -> <float32>[G,S,shared_dim+D].

    Raises:
      ConfigError: the model has no such network, or one of another width.
    """
    if not self.shared_dim:
      return x.astype(jnp.float32)
    shared = inputs['shared']
    if shared.shape[-1] != self.shared_dim:
      raise ConfigError(f'.shared_dim is {self.shared_dim}, but the shared network has width '
                        f'{shared.shape[-1]}. Make them equal.')
    return jnp.concatenate([shared.astype(jnp.float32), x.astype(jnp.float32)], axis=-1)


def sparsity_loss(probs: Float32[Array, 'G S E'], valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """Mean over valid tokens of `|p / |p|_2|_1`: 1 for a one-hot p, sqrt(E) for a uniform p (SpeechMoE, section 3.3).

  Args:
    probs: <float32>[G,S,E] summing to 1 over E.
    valid: <bool>[G,S].
  """
  squares = jnp.maximum(jnp.sum(probs**2, axis=-1), jnp.finfo(jnp.float32).tiny)
  return valid_mean(jnp.sum(probs, axis=-1) * jax.lax.rsqrt(squares), valid)


def mean_importance_loss(probs: Float32[Array, 'G S E'], valid: Bool[Array, 'G S']) -> Float32[Array, '']:
  """`E * sum_e (mean_t p_te)^2` over the valid tokens of all groups: 1 if balanced, E if collapsed (section 3.3).

  Args:
    probs: <float32>[G,S,E] summing to 1 over E.
    valid: <bool>[G,S].
  """
  mean = jnp.sum(jnp.where(valid[..., None], probs, 0), axis=(0, 1)) / jnp.maximum(valid.sum(), 1)
  return probs.shape[-1] * jnp.sum(mean**2)


@BALANCERS('sparsity')
class Sparsity(Balancer):
  """See `sparsity_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return sparsity_loss(routed.probs, routed.valid)


@BALANCERS('mean_importance')
class MeanImportance(Balancer):
  """See `mean_importance_loss`."""

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return mean_importance_loss(routed.probs, routed.valid)


@paper('SpeechMoE: Scaling to Large Acoustic Models with Dynamic Routing Mixture of Experts', '2105.03036',
       example=dict(shared_dim=5), alone=dict(shared_dim=5))
def speech_moe(shared_dim: int, sparsity: float = 0.15, importance: float = 0.15) -> dict[str, Any]:
  """SpeechMoE (arXiv 2105.03036).

  Section 3.1: p = softmax(W [shared; x]), where `shared`, of width `shared_dim`, comes from the shared embedding
  network without a gradient back to it. Section 3.2: the output is p times the best expert's. Section 3.3: sparsity and
  mean importance losses. From tencent-ailab/3m-asr, by the same group: no bias, no capacity, kernel gain 1/2, the
  losses and their coefficients; the paper's own may differ.
  """
  return dict(
      features=dict(name='with_shared', shared_dim=shared_dim),
      score=dict(name='linear', init_std='xavier/2'),
      select=dict(name='top_k', k=1),
      weigh=dict(name='softmax', order='before', renormalize='never'),
      place=dict(name='dropless'),
      balance=dict(sparsity=sparsity, mean_importance=importance))
