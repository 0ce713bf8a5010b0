"""Entropies that make selectors of experts selective, and soft permutations hard (DSelect-k, COMET)."""
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moejax.ranges import NonNegative
from moejax.routing.logits import normalized
from moejax.routing.score.smooth_step import EPSILON
from moejax.routing.stages import BALANCERS, Balancer, Routed

# Over tokens.
Reduction = Literal['mean', 'sum']


def entropy(selected: Float32[Array, '... K E']) -> Float32[Array, '...']:
  """`sum over k and experts of -r log(r + 1e-6)`: <float32>[..., K, E] -> <float32>[...]."""
  return -jnp.sum(selected * jnp.log(selected + EPSILON), axis=(-2, -1))


@BALANCERS('selector_entropy')
class SelectorEntropy(Balancer):
  """Summed entropy of the k selectors of DSelect-k, or trees of COMET: makes them selective.

  Config:
    reduction: over tokens: 'mean' (COMET) or 'sum' (DSelect-k with gate 'example').
  """

  reads = ('selectors',)

  def __init__(self, *, coefficient: NonNegative, reduction: Reduction = 'mean'):
    self.reduction: Reduction = reduction
    self.coefficient, self.total = coefficient, reduction == 'sum'

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return reduced(entropy(routed.scores.extras['selectors']), routed.valid, self.reduction)


def reduced(values: Float32[Array, 'G S'], valid: Bool[Array, 'G S'], reduction: Reduction) -> Float32[Array, '']:
  """The mean or sum of `values` <float32>[G,S] over the `valid` tokens <bool>[G,S]."""
  total = jnp.sum(jnp.where(valid, values, 0))
  return total if reduction == 'sum' else total / jnp.maximum(valid.sum(), 1)


def permutation_entropy(soft: Float32[Array, 'E E']) -> Float32[Array, '']:
  """`-sum P log P` of `soft` <float32>[E,E], whose columns sum to 1, plus the same with rows normalised; 0 for a
  permutation."""
  rows = normalized(soft)
  return -jnp.sum(soft * jnp.log(soft + EPSILON)) - jnp.sum(rows * jnp.log(rows + EPSILON))


@BALANCERS('permutation_entropy')
class PermutationEntropy(Balancer):
  """See `permutation_entropy`; for score 'comet' with `search_steps`."""

  reads = ('permutation',)

  def __init__(self, *, coefficient: NonNegative):
    self.coefficient = coefficient

  def loss(self, routed: Routed) -> Float32[Array, '']:
    return permutation_entropy(routed.scores.extras['permutation'])
