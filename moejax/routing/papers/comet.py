"""COMET: sparse differentiable trees with experts at the leaves, in an order found by local search."""
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moejax import functional
from moejax.ranges import Count, Positive
from moejax.routing.logits import normalized, vectors
from moejax.routing.papers import paper
from moejax.routing.score.local_search import LocalSearch
from moejax.routing.score.smooth_step import select_by_tree, smooth_step
from moejax.routing.stages import SCORES, Score, Scores


def mixture_of_leaves(leaves: Float32[Array, '... K E'],
                      logits: Float32[Array, '... K E']) -> Float32[Array, '... K E']:
  """Softmax of `logits + log(leaves)` over all leaves of all trees, without computing log 0 (section 3.1).

  Args:
    leaves: <float32>[...,K,E] probabilities, not all 0.
    logits: <float32>[...,K,E].

  Returns:
    <float32>[...,K,E] summing to 1 over K and E; 0, without a gradient to the logits, where the leaf is not reached.
  """
  reached = jnp.where(leaves > 0, logits + jnp.log(jnp.where(leaves > 0, leaves, 1.)), -jnp.inf)
  # log(leaves) is included: the largest logit may belong to a leaf hardly reached, and all weights could underflow.
  largest = jax.lax.stop_gradient(reached.max((-2, -1), keepdims=True))
  # Unreached leaves may have far larger logits, whose exponentials must stay finite.
  weights = leaves * jnp.exp(jnp.where(leaves > 0, logits - largest, 0.))
  return weights / weights.sum((-2, -1), keepdims=True)


@SCORES('comet')
class Comet(Score):
  """Shares of the experts at the leaves of k trees, whose nodes are smooth steps of linear functions (section 3).

  At most k are non-zero once every node is saturated.

  Config:
    k: number of trees, which bounds the experts per token.
    gamma: width of the steps.
    search_steps: training steps of local search for the order of the experts (COMET+); None: no search.
  """

  gives = ('selectors', 'permutation')

  def __init__(self, *, dim: int | None, num_experts: int, rngs: nnx.Rngs, k: Count, gamma: Positive = 1.,
               search_steps: Count | None = None):
    dim = vectors(dim)
    self.num_experts, self.gamma = num_experts, gamma
    self.gives = ('selectors',) if search_steps is None else ('selectors', 'permutation')

    def parameter(limit, shape, axes):
      uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
      return functional.parameter(rngs, uniform, shape, axes)

    nodes, leaves = (k, num_experts - 1), (k, num_experts)
    self.nodes = parameter(gamma / 100, (dim, *nodes), ('embed', None, None))
    self.nodes_bias = parameter(gamma / 100, nodes, (None, None))
    self.leaves = parameter(0.05, (dim, *leaves), ('embed', None, None))
    self.leaves_bias = parameter(0.05, leaves, (None, None))
    self.search = None if search_steps is None else LocalSearch(num_experts=num_experts, steps=search_steps, rngs=rngs)

  def __call__(self, features: Float32[Array, 'G S D'], *, key: jax.Array | None, train: bool) -> Scores:
    """`features`: <float32>[G,S,D]. The logits are shares; extras: `selectors` [G,S,K,E] and `permutation` [E,E]."""
    product = lambda kernel: jnp.einsum('gsd,dke->gske', features, kernel[...], precision=jax.lax.Precision.HIGHEST)
    steps = smooth_step(product(self.nodes) + self.nodes_bias[...], self.gamma)
    selectors = select_by_tree(steps, self.num_experts)
    shares = mixture_of_leaves(selectors, product(self.leaves) + self.leaves_bias[...]).sum(2)
    extras = dict(selectors=selectors)
    if self.search is not None:
      extras['permutation'] = self.search(train)
      shares = jnp.einsum('gse,ef->gsf', shares, extras['permutation'], precision=jax.lax.Precision.HIGHEST)
      shares = normalized(shares)  # rows of a soft permutation need not sum to 1
    return Scores(logits=shares, select=shares, clean=shares, extras=extras)

  def update(self) -> dict[str, Any]:
    return {} if self.search is None else dict(search=self.search.update())


@paper('COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search', '2306.02824',
       chooses='soft', exchangeable=False, example=dict(k=2), alone=dict(k=2))
def comet(k: int = 2, gamma: float = 1., entropy: float = 1e-2, search_steps: int | None = None,
          search_entropy: float = 1e-4) -> dict[str, Any]:
  """COMET (arXiv 2306.02824); with `search_steps` COMET+, which also searches for the order of the experts.

  Section 3: k trees with E - 1 inner nodes and E leaves each; entropy loss of the leaves, summed over trees and
  averaged over tokens. Section 4: one permutation for all trees, by Sinkhorn with temperatures from 1e-3 down to 1e-7
  in the first epochs; then the nearest permutation. Initial values, schedules and losses as in mazumder-lab/COMET,
  which tunes gamma and `entropy` from 0.001 to 10.
  """
  search = {} if search_steps is None else dict(permutation_entropy=search_entropy)
  return dict(
      score=dict(name='comet', k=k, gamma=gamma, search_steps=search_steps),
      select=dict(name='all'),
      weigh=dict(name='as_scored'),
      place=dict(name='dropless'),
      balance=dict(selector_entropy=entropy, **search))
