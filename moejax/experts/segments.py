"""Feed-forwards whose matrices are concatenated segments of several experts (MultiHash layers, 2106.04426)."""
from typing import Annotated

import jax
from flax import nnx
from jaxtyping import Array, Float

from moejax import functional
from moejax.config import ConfigError
from moejax.experts import EXPERTS, Expert, Layout
from moejax.kernels.expert_block import GATES, Activation, activate
from moejax.ranges import Count, Divides


@EXPERTS('segments')
class SegmentExperts(Expert):
  """`v = act([x A_1, .., x A_N])` and `[v B_1, .., v B_N]`; A_n [D,F/N] and B_n [F,D/N] are the token's n-th expert's.

  E experts combine to E^N feed-forwards (Hash Layers, section 3.2).

  Only dispatch 'segments' can run them, by `up` and `down`, because every segment of the output depends on all segments
  of the hidden layer. Parameters: `wi` and `wg` [N,E,D,F/N], `wo` [N,E,F,D/N].
  """

  def __init__(self, *, dim: int, num_experts: int | None, dtype, rngs: nnx.Rngs, hidden: Count,
               segments: Annotated[Count, Divides('dim'), Divides('hidden')], activation: Activation = 'relu'):
    """Initialises the weights.

    Args:
      dim: D.
      num_experts: E.
      dtype: dtype of the computation.
      rngs: source of the initial values.
      hidden: F.
      segments: N; divides D and F.
      activation: the nonlinearity; gated activations have a third matrix.
    """
    if num_experts is None:
      raise ConfigError(": a shared expert cannot be 'segments', which tokens choose. Use 'feed_forward'.")
    self.dtype, self.segments = dtype, segments
    self.activation: Activation = activation
    draw = jax.nn.initializers.variance_scaling(1., 'fan_in', 'truncated_normal', batch_axis=(0, 1))
    weight = lambda shape, axes: functional.parameter(rngs, draw, (segments, num_experts, *shape),
                                                      ('segment', 'expert', *axes))
    self.wi = weight((dim, hidden // segments), ('expert_embed', 'expert_mlp'))
    self.wg = weight((dim, hidden // segments), ('expert_embed', 'expert_mlp')) if activation in GATES else None
    self.wo = weight((hidden, dim // segments), ('expert_mlp', 'expert_embed'))

  def up(self, segment: int, rows: Float[Array, '... D'], layout: Layout) -> Float[Array, '... part']:
    """rows: <float>[..,D] in `layout` -> <float>[..,F/N], that segment of the hidden layer."""
    rows = rows.astype(self.dtype)
    matmul = lambda w: layout.matmul(rows, w[...][segment].astype(self.dtype))
    return activate(self.activation, matmul(self.wi), None if self.wg is None else matmul(self.wg))

  def down(self, segment: int, rows: Float[Array, '... F'], layout: Layout) -> Float[Array, '... part']:
    """rows: <float>[..,F] in `layout`, complete hidden layers -> <float>[..,D/N], that segment of the output."""
    return layout.matmul(rows.astype(self.dtype), self.wo[...][segment].astype(self.dtype))

  def __call__(self, rows: Float[Array, '... D'], layout: Layout, *, key: jax.Array | None = None,
               train: bool = False) -> Float[Array, '... D']:
    """Raises ConfigError: only dispatch 'segments' can call these experts."""
    raise ConfigError(": experts 'segments' need dispatch=dict(name='segments').")
