"""Whole layers as experts: attention and feed-forward with their norms and residuals (CrossTaskMoE, 2205.12701)."""
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.block import Block, BranchSpec
from moejax.layers.feed_forwards.moe import ExpertCount
from moejax.layers.stack import caches_of
from moejax.layers.sublayer import Axes, Caches, Context, Left
from moejax.random import derive
from moejax.routing import router as router_lib
from moejax.routing.plans import Leak, SoftPlan
from moejax.routing.router import RouterOutput

# Keys of `MoE` for experts that are feed-forwards.
_OF_FEED_FORWARDS = {'experts', 'dispatch', 'group', 'shared', 'shared_gate'}


class LayerMixture(nnx.Module):
  """`y = sum_e w_e layer_e(x)` (2205.12701, section 4): E identical dense blocks, and the router that weighs them.

  All layers compute all tokens, because attention also reads tokens with other experts. If the weights of a token sum
  to one, so do the residual streams. A token without any weight (padding, or dropped) passes through unchanged.

  Config keys:
    num_experts: E.
    router: the stages of the router (`moejax.routing`). Its groups are the rows of a batch.
  """

  def __init__(self, *, dim: int, rngs: nnx.Rngs, block: Callable[[nnx.Rngs], Block], num_experts: ExpertCount,
               router: Mapping):
    """`block` builds one layer."""
    self.router = router_lib.build(router, '.router', dim=dim, num_experts=num_experts, rngs=rngs)
    if self.router.select.reads_slots:
      raise ConfigError(".router: the slots of Soft MoE are mixtures of tokens, which have no positions for "
                        "attention. Choose a router that weighs experts per token, or another sparse_form.")
    self.num_experts = num_experts
    self.layers = typing.cast(Block, functional.stack_modules(block, num_experts, rngs, axis='expert'))

  def __call__(self, x: Float[Array, 'B S D'], context: Context, caches: Caches | None = None, *, key: jax.Array | None,
               depth: Any, train: bool) -> tuple[Float[Array, 'B S D'], RouterOutput, Caches]:
    """x: <float>[B,S,D] -> the same shape, the router's output, and what the layers remember if they were given caches."""
    routed = self.router(x, context.inputs, key=derive(key, 'router'), train=train)
    assert not isinstance(routed.plan, SoftPlan)
    weight = routed.plan.to_dense().weight
    graph, variables = nnx.split(self.layers)

    def layer(variables, expert, cache):
      own_key = None if key is None else jax.random.fold_in(derive(key, 'layers'), expert)
      y, left = nnx.merge(graph, variables)(x, context, cache, key=own_key, depth=depth, train=train)
      return y, caches_of(left)

    outputs, caches = jax.vmap(layer)(variables, jnp.arange(weight.shape[-1]), caches)
    with jax.named_scope('dispatch'):  # these products are not counted as the model's
      mixed = jnp.einsum('bse,ebsd->bsd', weight, outputs.astype(jnp.float32), precision='highest')
    return jnp.where(weight.any(-1, keepdims=True), mixed.astype(x.dtype), x), routed, caches


class BlockMixture(nnx.Module):
  """A block that is a mixture of layers. Raises ConfigError for keys of `MoE` that do not apply."""

  def __init__(self, spec: BranchSpec, *, dim: int, rngs: nnx.Rngs, block: Callable[[nnx.Rngs], Block]):
    config = {key: value for key, value in spec.config.items() if key != 'name'}
    if useless := sorted(set(config) & _OF_FEED_FORWARDS):
      raise ConfigError(f"{spec.where}.{useless[0]}: with sparse_form='layer' every expert is a whole layer, built from "
                        f"the model's attention and feed_forward, and computes all tokens. Remove {', '.join(useless)}.")
    self.where = spec.where
    self.moe = call(LayerMixture, config, spec.where, dim=dim, rngs=rngs, block=block)

  def init_cache(self, batch: int, length: int, memory_length: int = 0) -> dict[str, Caches]:
    """What the E layers remember, each of all tokens; see `Block.init_cache`."""
    of_layer = self.moe.layers.init_cache(batch, length, memory_length)
    return dict(moe=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.moe.num_experts, *leaf.shape)), of_layer))

  def cache_axes(self) -> dict[str, dict[str, Axes]]:
    """See `Block.cache_axes`."""
    of_layer = functional.flatten(self.moe.layers.cache_axes())
    return dict(moe=functional.unflatten({path: ('expert', *axes) for path, axes in of_layer.items()}))

  def leaks(self, train: bool) -> dict[str, Leak]:
    """See `Block.leaks`."""
    return {self.where: self.moe.router.leak(train)}

  def __call__(self, x: Float[Array, 'B S D'], context: Context, cache: dict[str, Caches] | None = None, *,
               key: jax.Array | None, depth: Any, train: bool,
               norms: None = None) -> tuple[Float[Array, 'B S D'], dict[str, Left]]:
    """See `Block`; layers keep their norms."""
    y, routed, caches = self.moe(x, context, (cache or {}).get('moe'), key=derive(key, 'moe'), depth=depth, train=train)
    return y, dict(moe=Left(routed, caches or None))
