"""Whole layers as experts: attention and feed-forward with their norms and residuals (CrossTaskMoE, 2205.12701)."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import functional
from moejax.config import ConfigError, call
from moejax.layers.blocks import Block, Context
from moejax.layers.moe import ExpertCount, MoEConfig
from moejax.random import derive
from moejax.routing import router
from moejax.routing.router import RouterOutput


@dataclasses.dataclass(frozen=True)
class LayersConfig:
  """The keys of `config.moe` with `sparse_form='layer'`.

  Attributes:
    num_experts: E.
    router: the stages of the router (`moejax.routing`). Its groups are the rows of a batch.
  """
  num_experts: ExpertCount
  router: dict


class LayerMixture(nnx.Module):
  """`y = sum_e w_e layer_e(x)` (2205.12701, section 4): E identical dense blocks, and the router that weighs them.

  All layers compute all tokens, because attention also reads tokens with other experts. If the weights of a token sum
  to one, so do the residual streams. A token without any weight (padding, or dropped) passes through unchanged.
  """

  def __init__(self, config: Mapping, where: str, *, dim: int, rngs: nnx.Rngs, block: Callable[[nnx.Rngs], Block]):
    """`block` builds one layer. Raises ConfigError for keys of `MoEConfig` that do not apply."""
    known = [{field.name for field in dataclasses.fields(keys)} for keys in (MoEConfig, LayersConfig)]
    if useless := sorted(set(config) & (known[0] - known[1])):
      raise ConfigError(f"{where}.{useless[0]}: with sparse_form='layer' every expert is a whole layer, built from the "
                        f"model's attention and feed_forward, and computes all tokens. Remove {', '.join(useless)}.")
    config = call(LayersConfig, config, where)
    self.router = router.build(config.router, f'{where}.router', dim=dim, num_experts=config.num_experts, rngs=rngs)
    if self.router.select.reads_slots:
      raise ConfigError(f"{where}.router: the slots of Soft MoE are mixtures of tokens, which have no positions for "
                        "attention. Choose a router that weighs experts per token, or another sparse_form.")
    self.layers = functional.stack_modules(block, config.num_experts, rngs, axis='expert')

  def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None, depth: Any,
               train: bool) -> tuple[jax.Array, RouterOutput]:
    """x: <float>[B,S,D] -> the same shape, and the router's output."""
    routed = self.router(x, context.inputs, key=derive(key, 'router'), train=train)
    weight = routed.plan.to_dense().weight
    graph, variables = nnx.split(self.layers)

    def layer(variables, expert):
      own_key = None if key is None else jax.random.fold_in(derive(key, 'layers'), expert)
      return nnx.merge(graph, variables)(x, context, key=own_key, depth=depth, train=train)[0]

    outputs = jax.vmap(layer)(variables, jnp.arange(weight.shape[-1]))
    with jax.named_scope('dispatch'):  # these products are not counted as the model's
      mixed = jnp.einsum('bse,ebsd->bsd', weight, outputs.astype(jnp.float32), precision='highest')
    return jnp.where(weight.any(-1, keepdims=True), mixed.astype(x.dtype), x), routed


class BlockMixture(nnx.Module):
  """A block that is a mixture of layers."""

  def __init__(self, moe: Mapping, where: str, **build):
    self.moe = LayerMixture(moe, f'{where}.moe', **build)

  def __call__(self, x: jax.Array, context: Context, *, key: jax.Array | None, depth: Any, train: bool,
               norms: None = None) -> tuple[jax.Array, RouterOutput]:
    """See `Block`; layers keep their norms."""
    y, output = self.moe(x, context, key=derive(key, 'moe'), depth=depth, train=train)
    updates = dict(moe=dict(router=output.updates)) if output.updates else {}
    return y, dataclasses.replace(output, updates=updates)
