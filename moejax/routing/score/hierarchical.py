"""Two levels of gates: a primary gate chooses groups of experts, and a gate in each group chooses among its experts.

Experts `i*M .. i*M + M-1` are group i. The logit of expert j in group i is `o_i + log softmax(h_i)_j`, so that the
logsumexp of a group is the primary logit o_i, and selection and weighting need only the logits.

Shazeer et al. 2017 (arXiv 1701.06538), appendix B.
"""
from typing import Annotated, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.ranges import Count, Divides, NonNegative
from moejax.routing.logits import vectors
from moejax.routing.score.noisy_linear import learned_noise_std
from moejax.routing.stages import SCORES, Score, Scores, required

# Number of equally large groups of experts.
Groups = Annotated[Count, Divides('num_experts')]


def joint_logits(outer: Float32[Array, '... N'], inner: Float32[Array, '... N M']) -> Float32[Array, '... N*M']:
  """<float32>[..., N] of the primary gate, [..., N, M] of the secondary gates -> [..., N*M]."""
  joint = outer[..., None] + jax.nn.log_softmax(inner, axis=-1)
  return joint.reshape(*outer.shape[:-1], -1)


def two_levels(logits: Float32[Array, '... E'],
               groups: int) -> tuple[Float32[Array, '... N'], Float32[Array, '... N M']]:
  """The inverse of `joint_logits`: (outer [..., N], inner [..., N, M] up to a constant per group)."""
  inner = logits.reshape(*logits.shape[:-1], groups, -1)
  return jax.nn.logsumexp(inner, axis=-1), inner


@SCORES('hierarchical')
class Hierarchical(Score):
  """A linear gate over groups and one in each group.

  Config:
    groups: N.
    noise: 'learned' (`noisy.NoisyLinear`) in training at both levels, or 'none'.
    init_std: initial standard deviation of all kernels.
    noise_floor: minimum standard deviation of the noise.
  """

  gives = ('outer', 'outer_clean', 'inner', 'inner_clean')

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, groups: Groups,
               noise: Literal['learned', 'none'] = 'learned', init_std: NonNegative = 0.,
               noise_floor: NonNegative = 1e-2):
    dim, size = vectors(dim), num_experts // groups
    init = nnx.initializers.normal(init_std)
    outer = lambda: functional.parameter(rngs, init, (dim, groups), ('embed', None))
    inner = lambda: functional.parameter(rngs, init, (dim, groups, size), ('embed', None, None))
    self.noisy, self.noise_floor = noise == 'learned', noise_floor
    self.outer, self.inner = outer(), inner()
    self.outer_noise, self.inner_noise = (outer(), inner()) if self.noisy else (None, None)

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]. extras: `outer` and `inner`, each with `_clean` and, with noise, `_std`."""
    def product(kernel):
      return jnp.einsum('gsd,d...->gs...', features, kernel[...], precision=jax.lax.Precision.HIGHEST)
    levels = dict(outer=(self.outer, self.outer_noise), inner=(self.inner, self.inner_noise))
    extras = {}
    for level, (kernel, noise_kernel) in levels.items():
      extras[level] = extras[f'{level}_clean'] = clean = product(kernel)
      if train and self.noisy:
        level_key = jax.random.fold_in(required(key, 'score "hierarchical" with noise'), level == 'inner')
        std = extras[f'{level}_std'] = learned_noise_std(product(noise_kernel), self.noise_floor)
        extras[level] = clean + std * jax.random.normal(level_key, clean.shape)
    logits = joint_logits(extras['outer'], extras['inner'])
    clean = joint_logits(extras['outer_clean'], extras['inner_clean'])
    return Scores(logits=logits, select=logits, clean=clean, extras=extras)
