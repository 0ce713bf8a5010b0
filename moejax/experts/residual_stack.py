"""Residual experts: each a stack of pre-norm feed-forward branches with its own residual stream."""
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.experts import EXPERTS, Expert, Layout
from moejax.experts.feed_forward import FeedForwardExperts
from moejax.kernels.expert_block import Activation
from moejax.random import derive
from moejax.ranges import Between, Count


@EXPERTS('residual_stack')
class ResidualStack(Expert):
  """Returns `F(x) - x`, where F is a stack of branches `x <- x + act(LN(x) Wi + bi) Wo + bo` (BASE layers, 2103.16716).

  `Wo` starts at zero, so each expert starts as the identity. With combine weight `a` and the residual connection the
  layer gives `x + a (F(x) - x) = a F(x) + (1-a) x`, the mixture of BASE layers, StableMoE and X-MoE; dropped tokens
  pass through unchanged. The model's `sparse_form='insert'` feeds it `x` itself.
  """

  def __init__(self, *, dim: int, num_experts: int | None, dtype, rngs: nnx.Rngs, hidden: Count,
               sublayers: Annotated[int, Between(1, 32)] = 1, activation: Activation = 'relu', use_bias: bool = True):
    """Initialises all sublayers; the defaults are fairseq's.

    Args:
      dim: D.
      num_experts: E, or None for a single stack without an expert axis.
      dtype: dtype of the computation.
      rngs: source of the initial values.
      hidden: F of each branch.
      sublayers: number of consecutive branches.
      activation: of each branch; gated activations have a third matrix.
      use_bias: whether the matrices have biases.
    """
    self.dtype = dtype
    self.sublayers = nnx.List([
        ResidualSublayer(dim=dim, num_experts=num_experts, dtype=dtype, rngs=rngs, hidden=hidden,
                         activation=activation, use_bias=use_bias) for _ in range(sublayers)])

  def __call__(self, rows: Float[Array, '... D'], layout: Layout, *, key: jax.Array | None = None,
               train: bool = False) -> Float[Array, '... D']:
    """rows: <float>[..,D] in `layout` -> <float>[..,D] of the computation's dtype: the update only."""
    stream = rows.astype(self.dtype)
    updates: list[jax.Array] = []
    for depth, sublayer in enumerate(self.sublayers):
      if updates:
        stream = stream + layout.whole(updates[-1])
      updates.append(sublayer(stream, layout, key=derive(key, depth), train=train))
    return sum(updates[1:], updates[0])


class ResidualSublayer(FeedForwardExperts):
  """One branch: a layer norm per expert (`norm_scale`, `norm_bias` [E,D]), then its feed-forward."""

  def __init__(self, *, dim: int, num_experts: int | None, rngs: nnx.Rngs, **feed_forward):
    super().__init__(dim=dim, num_experts=num_experts, rngs=rngs, **feed_forward)
    self.wo[...] = jnp.zeros_like(self.wo[...])
    shape, axes = ((dim,), ('embed',)) if num_experts is None else ((num_experts, dim), ('expert', 'expert_embed'))
    self.norm_scale = functional.parameter(rngs, nnx.initializers.ones, shape, axes)
    self.norm_bias = functional.parameter(rngs, nnx.initializers.zeros, shape, axes)

  def __call__(self, rows: Float[Array, '... D'], layout: Layout, *, key: jax.Array | None = None,
               train: bool = False) -> Float[Array, '... D']:
    """rows: <float>[..,D] in `layout` -> <float>[..,D]. Statistics are float32; epsilon is 1e-5 as in torch."""
    x = rows.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    normalised = x * layout.per_row(self.norm_scale[...]) + layout.per_row(self.norm_bias[...])
    return super().__call__(normalised, layout, key=key, train=train)
