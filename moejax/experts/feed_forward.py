"""Feed-forward experts: two matrices and an activation, or three with a gated activation."""
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.experts import EXPERTS, Expert, FusedExperts, Layout
from moejax.kernels import Weights
from moejax.kernels.expert_block import GATES, Activation, activate
from moejax.ranges import Count, Positive, Rate


@EXPERTS('feed_forward')
class FeedForwardExperts(Expert):
  """`act(x Wi + bi) Wo + bo`, or gated `(act(x Wg + bg) * (x Wi + bi)) Wo + bo`, per expert.

  Parameters, with a leading axis E unless `num_experts` is None: `wi` and `wg` [D,F], `wo` [F,D], `bi` and `bg` [F],
  `bo` [D].
  """

  def __init__(self, *, dim: int, num_experts: int | None, dtype, rngs: nnx.Rngs, hidden: Count,
               activation: Activation = 'gelu', use_bias: bool = False, dropout: Rate = 0.,
               init: Literal['independent', 'identical'] = 'independent', init_scale: Positive = 1.):
    """Initialises the weights; biases start at zero.

    Args:
      dim: D.
      num_experts: E, or None for one dense feed-forward without expert axis.
      dtype: dtype of the computation.
      rngs: source of the initial values.
      hidden: F.
      activation: the nonlinearity; 'geglu', 'reglu' and 'swiglu' are gated and have a third matrix.
      use_bias: whether there are biases.
      dropout: dropout rate of hidden units in training (Switch Transformer's expert dropout).
      init: 'independent', or 'identical': all experts start with the same weights (V-MoE and Soft MoE).
      init_scale: variance scaling with this scale and the fan-in of one expert, truncated normal; 0.1 in Switch
        Transformer, section 2.4.
    """
    self.dtype, self.dropout = dtype, dropout
    self.activation: Activation = activation
    lead, lead_axes = ((), ()) if num_experts is None else ((num_experts,), ('expert',))
    draw = jax.nn.initializers.variance_scaling(init_scale, 'fan_in', 'truncated_normal', batch_axis=range(len(lead)))

    def initialize(key, shape, dtype):
      if init == 'identical' and lead:
        return jnp.broadcast_to(draw(key, (1, *shape[1:]), dtype), shape)
      return draw(key, shape, dtype)

    def weight(shape, axes):
      return functional.parameter(rngs, initialize, lead + shape, lead_axes + axes)

    def bias(size, axis):
      return functional.parameter(rngs, jax.nn.initializers.zeros, (*lead, size), (*lead_axes, axis))

    gated = activation in GATES
    width, units = ('embed', 'mlp') if num_experts is None else ('expert_embed', 'expert_mlp')
    self.wi = weight((dim, hidden), (width, units))
    self.wg = weight((dim, hidden), (width, units)) if gated else None
    self.wo = weight((hidden, dim), (units, width))
    self.bi = bias(hidden, units) if use_bias else None
    self.bg = bias(hidden, units) if use_bias and gated else None
    self.bo = bias(dim, width) if use_bias else None

  def __call__(self, rows: Float[Array, '... D'], layout: Layout, *, key: jax.Array | None = None,
               train: bool = False) -> Float[Array, '... D']:
    """rows: <float>[..,D] in `layout` -> <float>[..,D] of the computation's dtype.

    Raises:
      ValueError: dropout in training without a key.
    """
    def affine(rows, w, b):
      y = layout.matmul(rows, w[...].astype(self.dtype))
      return y if b is None else y + layout.per_row(b[...].astype(self.dtype))

    rows = rows.astype(self.dtype)
    gate = None if self.wg is None else affine(rows, self.wg, self.bg)
    hidden = self.scaled(activate(self.activation, affine(rows, self.wi, self.bi), gate), layout)
    if train and self.dropout:
      if key is None:
        raise ValueError('dropout in training needs a key.')
      keep = layout.bernoulli(key, 1 - self.dropout, hidden.shape)
      hidden = jnp.where(keep, hidden / (1 - self.dropout), 0)
    return affine(hidden, self.wo, None if self.bo is None else layout.once(self.bo[...]))

  def scaled(self, hidden: Float[Array, '... F'], layout: Layout) -> Float[Array, '... F']:
    """hidden: <float>[..,F] in `layout`; the identity here, overridden by experts that scale their hidden units."""
    return hidden

  def block(self, train: bool) -> FusedExperts | None:
    """These experts as a fused block; None with dropout, which kernels do not support."""
    if train and self.dropout:
      return None
    cast = lambda w: w[...].astype(self.dtype)
    wg, bi, bg, bo = (None if w is None else cast(w) for w in (self.wg, self.bi, self.bg, self.bo))
    return FusedExperts(Weights(cast(self.wi), cast(self.wo), wg, bi, bg, bo), self.activation)
